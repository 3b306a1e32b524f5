// Exact: every item runs once, in the share that the static split names, however many threads and callers there are;
// where threads take what is left, a share runs on one of them at a time.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "onebit/threads.h"

namespace {

void check_regions(onebit::ThreadPool& pool, int n_regions) {
  for (int region = 0; region < n_regions; ++region) {
    const int n_items = region % 23;
    std::vector<int> runs(n_items, 0);
    std::vector<int> shares(n_items, -1);
    pool.run(n_items, [&](int share, int begin, int end) {
      for (int i = begin; i < end; ++i) {
        ++runs[i];
        shares[i] = share;
      }
    });
    for (int i = 0; i < n_items; ++i) {
      CHECK(runs[i] == 1);
      const int share = shares[i];
      CHECK(n_items == 1 ? share == 0 : n_items * share / pool.size() <= i && i < n_items * (share + 1) / pool.size());
    }
  }
}

void check_dynamic_regions(onebit::ThreadPool& pool, int n_regions) {
  for (int region = 0; region < n_regions; ++region) {
    const int n_items = region * 7 % 301;
    std::vector<std::atomic<int>> runs(n_items);
    std::vector<std::atomic<int>> in_share(pool.size());
    pool.run_dynamic(n_items, [&](int share, int begin, int end) {
      CHECK(share >= 0 && share < pool.size() && begin < end && end <= n_items);
      CHECK(++in_share[share] == 1);
      for (int i = begin; i < end; ++i) ++runs[i];
      --in_share[share];
    });
    for (int i = 0; i < n_items; ++i) CHECK(runs[i] == 1);
  }
}

void test_every_item_runs_once() {
  for (const int n_threads : {1, 2, 3, 7}) {
    onebit::ThreadPool pool(n_threads);
    CHECK(pool.size() == n_threads);
    pool.begin();
    check_regions(pool, 300);
    check_dynamic_regions(pool, 300);
  }
}

// The pause is longer than the workers spin, so every region finds them asleep.
void test_sleeping_workers_wake() {
  onebit::ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    check_regions(pool, 3);
  }
}

void test_callers_may_change_threads() {
  onebit::ThreadPool pool(2);
  for (int i = 0; i < 10; ++i) std::thread([&] { check_regions(pool, 20); }).join();
}

// Starting, ending at once, and ending while the workers sleep.
void test_pools_end() {
  for (int i = 0; i < 50; ++i) onebit::ThreadPool pool(4);
  onebit::ThreadPool pool(2);
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

void test_threads() {
  test_every_item_runs_once();
  test_sleeping_workers_wake();
  test_callers_may_change_threads();
  test_pools_end();
}
