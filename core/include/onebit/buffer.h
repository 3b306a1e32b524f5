// Memory that grows on demand and keeps its size, so that a steady state allocates nothing.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace onebit {

template <class T>
class Buffer {
 public:
  // At least n values, aligned to a cache line. Growing forgets the contents. Throws std::bad_alloc.
  T* reserve(std::size_t n) {
    if (n > capacity_) {
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kAlign})));
      capacity_ = n;
    }
    return data_.get();
  }

  T* get() const { return data_.get(); }

 private:
  static constexpr std::size_t kAlign = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };

  std::unique_ptr<T, Free> data_;
  std::size_t capacity_ = 0;
};

}  // namespace onebit
