// core_tests [--expect TABLE...]: all tests, over every table of kernels that this machine runs. Those that are
// expected, best first, must be there and no others, so that a table does not fall out unnoticed.
#include <cstring>
#include <string>

#include "check.h"
#include "onebit/kernels.h"

void test_float_mode();
void test_kernels();
void test_rope();
void test_same_bits();
void test_sampling();
void test_self_test();
void test_threads();

namespace {

std::string available_names() {
  const onebit::Kernels* tables[16];
  const int n = onebit::available_kernels(tables, 16);
  std::string names = tables[0]->name;
  for (int i = 1; i < n; ++i) names = names + " " + tables[i]->name;
  return names;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string names = available_names();
  if (argc > 2 && std::strcmp(argv[1], "--expect") == 0) {
    std::string expected = argv[2];
    for (int i = 3; i < argc; ++i) expected = expected + " " + argv[i];
    if (names != expected) {
      std::fprintf(stderr, "this machine has the kernels %s; expected %s\n", names.c_str(), expected.c_str());
      return 1;
    }
  }
  test_float_mode();
  test_kernels();
  test_rope();
  test_same_bits();
  test_sampling();
  test_self_test();
  test_threads();
  if (n_failed_checks) {
    std::fprintf(stderr, "%d checks failed with the kernels %s\n", n_failed_checks, names.c_str());
  } else {
    std::fprintf(stderr, "all checks passed with the kernels %s\n", names.c_str());
  }
  return n_failed_checks ? 1 : 0;
}
