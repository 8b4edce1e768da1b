// Greedy generation by a program of nothing but the core: the same ids on every processor and instruction set.
//   generate_story MODEL_DIR COUNT THREADS TOKEN...
// prints COUNT token ids on one line, and the instruction set on stderr.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "sparse_run/engine.h"

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s MODEL_DIR COUNT THREADS TOKEN...\n", argv[0]);
    return 2;
  }
  try {
    const int count = std::atoi(argv[2]);
    std::vector<int32_t> prompt;
    for (int i = 4; i < argc; i++) prompt.push_back(int32_t(std::atoi(argv[i])));
    sr::Model model({argv[1], std::atoi(argv[3])});
    std::fprintf(stderr, "isa %s\n", model.isa().c_str());
    sr::Session session(model, int(prompt.size()) + count);
    session.eval(prompt.data(), int(prompt.size()));
    sr::SamplerOptions options;
    options.temperature = 0;
    sr::Sampler sampler(options);
    for (int i = 0; i < count; i++) std::printf(i ? " %d" : "%d", session.step(&sampler));
    std::printf("\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
