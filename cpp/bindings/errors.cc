// Core errors become the classes of sparse_run.errors; running out of memory becomes BudgetError.
#include <new>

#include "bindings/bindings.h"

namespace sr {
namespace {

const char* class_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::usage: return "UsageError";
    case ErrorCode::model: return "ModelError";
    case ErrorCode::unsupported: return "UnsupportedModelError";
    case ErrorCode::budget: return "BudgetError";
    case ErrorCode::context: return "ContextLengthError";
    case ErrorCode::isa: return "IsaError";
    case ErrorCode::cancelled: return "Cancelled";
    case ErrorCode::runtime: break;
  }
  return "Error";
}

void raise(ErrorCode code, const char* text) {
  try {
    const py::object type = py::module_::import("sparse_run.errors").attr(class_name(code));
    PyErr_SetString(type.ptr(), text);
  } catch (py::error_already_set& e) {
    e.restore();
  }
}

}  // namespace

void bind_errors() {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      raise(e.code(), e.what());
    } catch (const std::bad_alloc&) {
      raise(ErrorCode::budget, "not enough memory: use a smaller context or model, or free memory");
    }
  });
}

}  // namespace sr
