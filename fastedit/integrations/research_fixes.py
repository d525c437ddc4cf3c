"""The corrections of the research repositories' published code that can be asked for by name."""

FIXES = {
    "memit_seq_cache": "MEMIT_seq: the keys of earlier batches reach the worker, which fails without them",
    "nse_raw_target": "targets made before the first edit get the leading space that the edit itself gives them",
    "nse_p_overflow": "NSE: where one neuron holds more than the wanted mass, it is chosen",
    "template_not_keyed": "context templates are sampled for each model, not once for the process",
    "ultra_floor_ceil": "UltraEdit: the gradients of a last micro-batch that is not full are used",
    "running_var": "UltraEdit: the running spread is that of the rows, also for a batch of one",
}
