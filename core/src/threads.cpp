#include "onebit/threads.h"

#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

#include "onebit/float_mode.h"

namespace onebit {
namespace {

// Long enough to bridge the sampling of a token, short enough not to be noticed when idle.
constexpr std::chrono::microseconds kSpinTime{100};
constexpr int kPausesPerLook = 64;
constexpr int kPausesBeforeYield = 2048;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::int64_t current_process() {
#ifdef _WIN32
  return _getpid();
#else
  return getpid();
#endif
}

int share_begin(int n_items, int share, int n_shares) {
  return static_cast<int>(static_cast<std::int64_t>(n_items) * share / n_shares);
}

}  // namespace

// A region is cut into one share per thread. A share belongs to its thread unless the caller, done with its own, finds it
// untouched: a worker that sleeps or waits for a core then holds up nobody.
struct ThreadPool::Shared {
  struct alignas(64) Claim {
    std::atomic<std::uint32_t> epoch{0};  // of the last region whose share was taken
  };

  // The caller writes the region, then advances the epoch. Whoever claims a share of the epoch may read the region, which
  // stays until every share is done.
  alignas(64) std::atomic<std::uint32_t> epoch{0};
  Region region = nullptr;
  void* body = nullptr;
  int n_items = 0;
  alignas(64) std::atomic<int> n_unfinished{0};
  alignas(64) std::atomic<int> n_sleeping{0};
  std::atomic<bool> is_ending{false};
  std::mutex mutex;
  std::condition_variable awake;
  std::vector<Claim> claims;

  explicit Shared(int n_threads) : claims(static_cast<std::size_t>(n_threads)) {}

  void publish() {
    epoch.fetch_add(1, std::memory_order_seq_cst);
    // A worker counts itself asleep before it looks at the epoch for the last time, so one of the two sees the other.
    if (n_sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard lock(mutex);
      awake.notify_all();
    }
  }

  void wait_for_change(std::uint32_t seen) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < kPausesPerLook; ++i) {
        if (epoch.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock lock(mutex);
    n_sleeping.fetch_add(1, std::memory_order_seq_cst);
    awake.wait(lock, [&] { return epoch.load(std::memory_order_seq_cst) != seen; });
    n_sleeping.fetch_sub(1, std::memory_order_relaxed);
  }

  // Runs a share of the region of this epoch, unless somebody else has taken it.
  void run_share(int share, std::uint32_t current) {
    const int n_shares = static_cast<int>(claims.size());
    std::uint32_t previous = current - 1;
    if (!claims[static_cast<std::size_t>(share)].epoch.compare_exchange_strong(previous, current)) return;
    region(body, share, share_begin(n_items, share, n_shares), share_begin(n_items, share + 1, n_shares));
    n_unfinished.fetch_sub(1, std::memory_order_release);
  }

  void work(int thread) {
    std::uint32_t seen = 0;
    for (;;) {
      wait_for_change(seen);
      seen = epoch.load(std::memory_order_acquire);
      if (is_ending.load(std::memory_order_relaxed)) return;
      run_share(thread, seen);
    }
  }
};

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
  assert(n_threads >= 1);
  start();
}

ThreadPool::~ThreadPool() {
  if (process_ == current_process()) {
    stop();
  } else {
    abandon();
  }
}

void ThreadPool::begin() {
  if (process_ != current_process()) {
    abandon();
    start();
  }
}

void ThreadPool::fork_join(int n_items, Region region, void* body) {
  Shared& shared = *shared_;
  shared.region = region;
  shared.body = body;
  shared.n_items = n_items;
  shared.n_unfinished.store(n_threads_, std::memory_order_relaxed);
  shared.publish();
  const std::uint32_t current = shared.epoch.load(std::memory_order_relaxed);
  for (int share = 0; share < n_threads_; ++share) shared.run_share(share, current);
  // Where threads outnumber cores, the worker waited for may need this one.
  for (int i = 0; shared.n_unfinished.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kPausesBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::start() {
  shared_ = std::make_unique<Shared>(n_threads_);
  workers_.reserve(static_cast<std::size_t>(n_threads_ - 1));
  try {
    for (int thread = 1; thread < n_threads_; ++thread) {
      workers_.emplace_back([shared = shared_.get(), thread] {
        StandardFloatMode float_mode;
        shared->work(thread);
      });
    }
  } catch (...) {
    stop();
    throw;
  }
  process_ = current_process();
}

void ThreadPool::stop() {
  shared_->is_ending.store(true, std::memory_order_relaxed);
  shared_->publish();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

// The threads of a forked parent can be neither joined nor freed here: let go of their memory.
void ThreadPool::abandon() {
  static_cast<void>(shared_.release());
  static_cast<void>(new std::vector<std::thread>(std::exchange(workers_, std::vector<std::thread>())));
}

}  // namespace onebit
