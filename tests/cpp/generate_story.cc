// Greedy generation by a program of nothing but the core: the same ids on every processor and instruction set.
//   generate_story MODEL_DIR COUNT THREADS TOKEN...
// prints COUNT token ids on one line, and the instruction set on stderr. SPARSE_RUN_STORY_DEVICE=cuda: on the GPU, of
// whose memory SPARSE_RUN_STORY_DEVICE_MEMORY bytes are taken at most.
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
    sr::ModelOptions options;
    options.path = argv[1];
    options.threads = std::atoi(argv[3]);
    if (const char* device = std::getenv("SPARSE_RUN_STORY_DEVICE")) options.device = device;
    if (const char* bytes = std::getenv("SPARSE_RUN_STORY_DEVICE_MEMORY"))
      options.device_memory = size_t(std::atoll(bytes));
    options.n_ctx = options.device == "cpu" ? 0 : int(prompt.size()) + count;
    sr::Model model(options);
    if (options.device == "cpu") std::fprintf(stderr, "isa %s\n", model.isa().c_str());
    else
      std::fprintf(stderr, "device %s, %.0f%% of the neurons\n", model.device().c_str(),
                   100 * model.device_memory().hot_share);
    sr::Session session(model, int(prompt.size()) + count);
    session.eval(prompt.data(), int(prompt.size()));
    sr::SamplerOptions greedy;
    greedy.temperature = 0;
    sr::Sampler sampler(greedy);
    for (int i = 0; i < count; i++) std::printf(i ? " %d" : "%d", session.step(&sampler));
    std::printf("\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
