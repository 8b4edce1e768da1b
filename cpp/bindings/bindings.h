// What the files of this folder share: registration functions and checked views of NumPy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "sparse_run/error.h"

namespace sr {

namespace py = pybind11;

void bind_errors();
void bind_system(py::module_& m);
void bind_pack(py::module_& m);
void bind_model(py::module_& m);
void bind_sampler(py::module_& m);
void bind_session(py::module_& m);
void bind_sparsity(py::module_& m);
void bind_measure(py::module_& m);
void bind_predictor(py::module_& m);

// UsageError unless columns per scale are 32 or 16.
void check_group(py::ssize_t group);
// Slabs that share a unit, from the columns that do; 0 where scales are halves.
int unit_slabs_of(py::ssize_t superblock);

// The array in C order, of this dtype kind ('f', 'u', 'i'), item size and number of dimensions, or UsageError.
inline py::array checked_array(const py::array& a, char kind, int itemsize, int ndim, const char* name) {
  if (a.dtype().kind() != kind || a.dtype().itemsize() != itemsize || a.ndim() != ndim) {
    const std::string type = kind == 'f' ? "float" : kind == 'u' ? "uint" : "int";
    throw Error(ErrorCode::usage, std::string(name) + " must be a " + std::to_string(ndim) + "-dimensional array of " +
                                      type + std::to_string(8 * itemsize) + ", got " + std::to_string(a.ndim()) +
                                      "-dimensional " + py::str(a.dtype()).cast<std::string>());
  }
  py::array c = py::array::ensure(a, py::array::c_style);
  if (!c) throw py::error_already_set();
  return c;
}

}  // namespace sr
