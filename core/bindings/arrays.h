// Arrays from Python, checked: what does not fit raises ValueError.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

namespace onebit::bindings {

namespace nb = nanobind;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw nb::value_error(message.str().c_str());
}

// Raises ValueError with the parts of a message, which cost nothing while the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// A contiguous array of T with the shape it came with.
template <class T>
struct Array {
  nb::ndarray<nb::ro, nb::device::cpu> owner;
  const T* data;

  std::int64_t size(int axis) const { return static_cast<std::int64_t>(owner.shape(axis)); }
  int ndim() const { return static_cast<int>(owner.ndim()); }
};

template <class T>
constexpr const char* kTypeName = nullptr;
template <>
constexpr const char* kTypeName<float> = "float32";
template <>
constexpr const char* kTypeName<std::int32_t> = "int32";
template <>
constexpr const char* kTypeName<std::uint8_t> = "uint8";
template <>
constexpr const char* kTypeName<std::uint16_t> = "uint16";

// Of any rank where ndim is 0.
template <class T>
Array<T> array(nb::handle value, std::string_view name, std::size_t ndim) {
  nb::ndarray<nb::ro, nb::device::cpu> a;
  bool fits = nb::ndarray_check(value) && nb::try_cast(value, a) && a.dtype() == nb::dtype<T>();
  fits = fits && (ndim == 0 || a.ndim() == ndim);
  std::int64_t stride = 1;
  for (std::size_t axis = fits ? a.ndim() : 0; axis-- > 0;) {
    fits = fits && (a.shape(axis) == 1 || a.size() == 0 || a.stride(axis) == stride);
    stride *= static_cast<std::int64_t>(a.shape(axis));
  }
  if (!fits && ndim != 0) fail(name, ": expected a contiguous ", kTypeName<T>, " array of ", ndim, " dimensions");
  require(fits, name, ": expected a contiguous ", kTypeName<T>, " array");
  const T* data = static_cast<const T*>(a.data());
  require(reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0, name, ": the array is not aligned");
  return {std::move(a), data};
}

inline std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

}  // namespace onebit::bindings
