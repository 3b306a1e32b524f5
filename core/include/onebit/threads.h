// A pool of threads for regions of a microsecond: fork, split, join.
//
// Workers spin for a moment after each region, because the next one usually follows at once, and sleep after that:
// an idle pool costs nothing. The calling thread works too. One caller at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace onebit {

class ThreadPool {
 public:
  // Throws std::system_error when the system refuses a thread.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }

  // To be called before a series of regions: a process made by fork() has none of the workers, and gets new ones here.
  // Throws std::system_error.
  void begin();

  // Calls fn(share, begin, end) for each of size() shares, [n * share / size, n * (share + 1) / size) of n_items, and
  // returns when all are done. Shares run at the same time, on whichever threads are awake. fn must not throw. A single
  // item runs on the caller.
  template <class Fn>
  void run(int n_items, Fn&& fn) {
    using Body = std::remove_reference_t<Fn>;
    if (n_threads_ == 1 || n_items <= 1) {
      if (n_items > 0) fn(0, 0, n_items);
      return;
    }
    fork_join(
        n_items, [](void* body, int share, int begin, int end) { (*static_cast<Body*>(body))(share, begin, end); },
        const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
  }

  // The same, but each thread takes a few items at a time until none is left, and fn is called for each few. For regions
  // of a tenth of a millisecond and more: cores may differ in speed, or have other work to do.
  template <class Fn>
  void run_dynamic(int n_items, Fn&& fn) {
    constexpr int kTurns = 8;  // of each thread, where all are equally fast
    const int few = std::max(1, n_items / (kTurns * n_threads_));
    std::atomic<int> next{0};
    run(std::min(n_threads_, n_items), [&](int share, int, int) {
      for (int begin; (begin = next.fetch_add(few, std::memory_order_relaxed)) < n_items;) {
        fn(share, begin, std::min(begin + few, n_items));
      }
    });
  }

 private:
  using Region = void (*)(void* body, int share, int begin, int end);
  struct Shared;

  void fork_join(int n_items, Region region, void* body);
  void start();
  void stop();
  void abandon();

  int n_threads_;
  std::int64_t process_ = 0;
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace onebit
