#include "check.h"

void test_rope();
void test_sampling();
void test_self_test();
void test_threads();

int main() {
  test_rope();
  test_sampling();
  test_self_test();
  test_threads();
  std::fprintf(stderr, n_failed_checks ? "%d checks failed\n" : "all checks passed\n", n_failed_checks);
  return n_failed_checks ? 1 : 0;
}
