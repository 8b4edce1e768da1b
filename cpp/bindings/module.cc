// The Python module sparse_run._core; its contract is python/sparse_run/_core.pyi.
#include "bindings/bindings.h"

#ifndef SPARSE_RUN_VERSION
#define SPARSE_RUN_VERSION "0"
#endif

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of sparse_run.";
  m.attr("__version__") = SPARSE_RUN_VERSION;
  sr::bind_errors();
  sr::bind_system(m);
  sr::bind_pack(m);
  sr::bind_measure(m);
  sr::bind_model(m);
  sr::bind_sampler(m);
  sr::bind_sparsity(m);
  sr::bind_predictor(m);
  sr::bind_session(m);
}
