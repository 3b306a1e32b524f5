// Denormals kept and rounding to nearest, whatever a library has set on the calling thread.
#pragma once

#include <cfenv>

namespace onebit {

// The standard floating-point environment while it lives, the caller's again afterwards.
class StandardFloatMode {
 public:
  StandardFloatMode() noexcept {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloatMode() { std::fesetenv(&callers_); }
  StandardFloatMode(const StandardFloatMode&) = delete;
  StandardFloatMode& operator=(const StandardFloatMode&) = delete;

 private:
  std::fenv_t callers_;
};

}  // namespace onebit
