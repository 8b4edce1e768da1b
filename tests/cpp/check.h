// A whole test framework in one header: TEST_CASE("sentence") { CHECK(...); }, one executable per *_test.cc.
// The exit status is 1 when a check failed or a case threw; arguments select the cases whose name contains one of them.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace sr_test {

struct Case {
  const char* name;
  void (*body)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}
inline int& failures() {
  static int count = 0;
  return count;
}
inline bool add_case(const char* name, void (*body)()) {
  cases().push_back({name, body});
  return true;
}
inline void fail(const char* file, int line, const std::string& what) {
  if (++failures() <= 50) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}
template <class A, class B>
std::string both(const char* text, const A& a, const B& b) {
  std::ostringstream out;
  out.precision(9);
  out << "not equal: " << text << ": " << a << " and " << b;
  return out.str();
}
// A function, so that temporaries in the operands live until they are compared.
template <class A, class B>
void check_equal(const char* file, int line, const char* text, const A& a, const B& b) {
  if (!(a == b)) fail(file, line, both(text, a, b));
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace sr_test

#define SR_JOIN2(a, b) a##b
#define SR_JOIN(a, b) SR_JOIN2(a, b)
#define TEST_CASE(name)                                                                                      \
  static void SR_JOIN(test_body_, __LINE__)();                                                               \
  [[maybe_unused]] static const bool SR_JOIN(test_added_, __LINE__) =                                        \
      sr_test::add_case(name, SR_JOIN(test_body_, __LINE__));                                                \
  static void SR_JOIN(test_body_, __LINE__)()
#define CHECK(cond)                                                              \
  do {                                                                           \
    if (!(cond)) sr_test::fail(__FILE__, __LINE__, "failed: " #cond);            \
  } while (0)
#define CHECK_EQ(a, b) sr_test::check_equal(__FILE__, __LINE__, #a ", " #b, (a), (b))
// |a - b| <= tol; NaN fails.
#define CHECK_NEAR(a, b, tol)                                                                                \
  do {                                                                                                       \
    const double check_a = double(a), check_b = double(b);                                                   \
    if (!(std::fabs(check_a - check_b) <= double(tol)))                                                      \
      sr_test::fail(__FILE__, __LINE__, sr_test::both(#a ", " #b " within " #tol, check_a, check_b));        \
  } while (0)
// expr throws `type` and its text contains `part`.
#define CHECK_THROWS(expr, type, part)                                                                       \
  do {                                                                                                       \
    bool check_thrown = false;                                                                               \
    try {                                                                                                    \
      (void)(expr);                                                                                          \
    } catch (const type& e) {                                                                                \
      check_thrown = true;                                                                                   \
      if (!std::strstr(e.what(), part))                                                                      \
        sr_test::fail(__FILE__, __LINE__, std::string("wrong text of " #expr ": ") + e.what());              \
    }                                                                                                        \
    if (!check_thrown) sr_test::fail(__FILE__, __LINE__, "did not throw " #type ": " #expr);                 \
  } while (0)

// Every test file includes this header once and gets its main here.
int main(int argc, char** argv) {
  int ran = 0, failed = 0;
  for (const sr_test::Case& c : sr_test::cases()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; i++) wanted = wanted || std::strstr(c.name, argv[i]);
    if (!wanted) continue;
    const int before = sr_test::failures();
    try {
      c.body();
    } catch (const std::exception& e) {
      sr_test::fail(c.name, 0, std::string("threw: ") + e.what());
    }
    ran++;
    if (sr_test::failures() != before) {
      failed++;
      std::fprintf(stderr, "FAILED: %s\n", c.name);
    }
  }
  std::fprintf(stderr, "%d cases, %d failed\n", ran, failed);
  return failed || !ran ? 1 : 0;
}
