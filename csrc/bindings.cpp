// fastedit._C: the compiled kernels. bindings/<stem>.cpp checks the arguments of one hot path, picks cpu or cuda,
// allocates scratch memory, releases the GIL and launches.
#include <algorithm>
#include <string>

#include "bindings/common.h"

#if !defined(FASTEDIT_VERSION)
#define FASTEDIT_VERSION "unknown"
#endif
#if !defined(FASTEDIT_CUDA_ARCHS)
#define FASTEDIT_CUDA_ARCHS ""
#endif

namespace fastedit {

void bind_covariance(py::module_& m);
void bind_low_rank(py::module_& m);
void bind_masked_update(py::module_& m);
void bind_neuron_select(py::module_& m);
void bind_retrieval(py::module_& m);
void bind_routing(py::module_& m);
void bind_ties(py::module_& m);

namespace {

py::dict info() {
  py::dict out;
  py::list archs;
  const std::string text = FASTEDIT_CUDA_ARCHS;
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(';', start), text.size());
    archs.append(text.substr(start, end - start));
    start = end + 1;
  }
#if defined(FASTEDIT_WITH_CUDA)
  const cuda::Availability cuda = cuda::availability();
  out["cuda_built"] = true;
  out["cuda_available"] = cuda.available;
  out["cuda_reason"] = cuda.reason;
#else
  out["cuda_built"] = false;
  out["cuda_available"] = false;
  out["cuda_reason"] = "built without CUDA kernels (" FASTEDIT_NO_CUDA_REASON ")";
#endif
  out["version"] = FASTEDIT_VERSION;
  out["cuda_archs"] = archs;
  out["cpu_isa"] = name_of(best_isa());
  out["openmp_max_threads"] = max_threads();
  return out;
}

}  // namespace
}  // namespace fastedit

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastedit. Called through fastedit.ops, which documents and checks the arguments.";
  fastedit::bind_covariance(m);
  fastedit::bind_low_rank(m);
  fastedit::bind_masked_update(m);
  fastedit::bind_neuron_select(m);
  fastedit::bind_retrieval(m);
  fastedit::bind_routing(m);
  fastedit::bind_ties(m);
  m.def("info", &fastedit::info, "What was built, what this machine has, and why CUDA is not available if it is not.");
}
