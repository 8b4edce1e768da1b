// One process-wide sink for messages of the core; silent until somebody sets it.
#pragma once

#include <functional>
#include <string>

namespace sr {

enum class LogLevel { debug = 10, info = 20, warning = 30, error = 40 };  // the numbers of Python's logging

using LogSink = std::function<void(LogLevel, const std::string&)>;

// An empty sink makes the core silent again. Any thread may call the sink, never two at once.
void set_log_sink(LogSink sink, LogLevel least = LogLevel::info);

void log_message(LogLevel level, const std::string& text);

}  // namespace sr
