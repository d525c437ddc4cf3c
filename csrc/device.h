// What the bindings need of CUDA besides the kernels; implemented in cuda/device.cu.
#pragma once

#include <cstddef>
#include <string>

namespace fastedit::cuda {

struct Availability {
  bool available;
  std::string reason;  // why not; empty if available
};

// Starts no context.
Availability availability();

// The runtime's text for a status that a launcher returned.
std::string error_text(int status);

// Stream-ordered scratch memory on a device; status as from the launchers.
int allocate(void** out, size_t bytes, int device, void* stream);
int release(void* memory, int device, void* stream);

}  // namespace fastedit::cuda
