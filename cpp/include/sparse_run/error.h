// Errors of the core: what is wrong, where, and what to do, with a code that maps to a Python class and an exit code.
#pragma once

#include <stdexcept>
#include <string>

namespace sr {

enum class ErrorCode { runtime, usage, model, unsupported, budget, context, isa, cancelled };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& what) : std::runtime_error(what), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace sr

// Always on; for cold paths. A failure is a bug of ours, never a user's file.
#define SR_CHECK(cond)                                                                               \
  do {                                                                                               \
    if (!(cond)) throw sr::Error(sr::ErrorCode::runtime, std::string("internal check failed: ") + #cond); \
  } while (0)
