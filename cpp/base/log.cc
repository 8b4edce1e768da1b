// The sink is kept behind a mutex: messages are rare and never on the token path.
#include "base/log.h"

#include <mutex>

namespace sr {
namespace {
struct State {
  std::mutex mutex;
  LogSink sink;
  LogLevel least = LogLevel::info;
};
State& state() {
  static State* s = new State;  // never destroyed: threads may log while the process ends
  return *s;
}
}  // namespace

void set_log_sink(LogSink sink, LogLevel least) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.sink = std::move(sink);
  s.least = least;
}

void log_message(LogLevel level, const std::string& text) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.sink && level >= s.least) s.sink(level, text);
}

}  // namespace sr
