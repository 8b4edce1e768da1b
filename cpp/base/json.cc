// Recursive descent over RFC 8259; the depth limit keeps hostile nesting from exhausting the stack.
#include "base/json.h"

#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>

namespace sr {
namespace {

constexpr int kMaxDepth = 64;

bool digit(char c) { return c >= '0' && c <= '9'; }

double to_double(std::string_view text, bool* ok) {
  double value = 0;
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
  const auto r = std::from_chars(text.data(), text.data() + text.size(), value);
  *ok = r.ptr == text.data() + text.size() && r.ec == std::errc();
#else
  std::istringstream in{std::string(text)};
  in.imbue(std::locale::classic());  // strtod would follow the user's decimal comma
  *ok = bool(in >> value) && in.peek() == EOF;
#endif
  return value;
}

// Bytes of the UTF-8 sequence at s, or 0 when it is not valid.
size_t utf8_length(std::string_view s) {
  const auto at = [&](size_t i) { return i < s.size() ? uint8_t(s[i]) : uint8_t(0); };
  const auto tail = [&](size_t i) { return (at(i) & 0xc0) == 0x80; };
  const uint8_t a = at(0), b = at(1);
  if (a < 0x80) return 1;
  if (a >= 0xc2 && a <= 0xdf) return tail(1) ? 2 : 0;
  if ((a & 0xf0) == 0xe0) {
    if (!tail(1) || !tail(2) || (a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f)) return 0;
    return 3;
  }
  if (a >= 0xf0 && a <= 0xf4) {
    if (!tail(1) || !tail(2) || !tail(3) || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f)) return 0;
    return 4;
  }
  return 0;
}

void append_utf8(std::string* out, uint32_t c) {
  if (c < 0x80) {
    *out += char(c);
  } else if (c < 0x800) {
    *out += char(0xc0 | c >> 6);
    *out += char(0x80 | (c & 63));
  } else if (c < 0x10000) {
    *out += char(0xe0 | c >> 12);
    *out += char(0x80 | (c >> 6 & 63));
    *out += char(0x80 | (c & 63));
  } else {
    *out += char(0xf0 | c >> 18);
    *out += char(0x80 | (c >> 12 & 63));
    *out += char(0x80 | (c >> 6 & 63));
    *out += char(0x80 | (c & 63));
  }
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = this->value(0);
    space();
    if (pos_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw JsonError("invalid JSON at byte " + std::to_string(pos_) + ": " + what);
  }
  char peek() const { return pos_ < text_.size() ? text_[pos_] : '\0'; }
  void space() {
    while (pos_ < text_.size() && std::string_view(" \t\n\r").find(text_[pos_]) != std::string_view::npos) pos_++;
  }
  void expect(char c) {
    if (pos_ >= text_.size() || text_[pos_] != c) fail(std::string("expected '") + c + "'");
    pos_++;
  }
  void word(std::string_view w) {
    if (text_.substr(pos_, w.size()) != w) fail("unknown word");
    pos_ += w.size();
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    space();
    Json v;
    switch (peek()) {
      case '{': object(&v, depth); break;
      case '[': array(&v, depth); break;
      case '"':
        v.type_ = Json::Type::string;
        v.string_ = string();
        break;
      case 't':
      case 'f':
        v.type_ = Json::Type::boolean;
        v.bool_ = peek() == 't';
        word(v.bool_ ? "true" : "false");
        break;
      case 'n': word("null"); break;
      default: number(&v);
    }
    return v;
  }

  void object(Json* v, int depth) {
    v->type_ = Json::Type::object;
    expect('{');
    space();
    if (peek() == '}') {
      pos_++;
      return;
    }
    for (;;) {
      space();
      std::string key = string();
      space();
      expect(':');
      if (!v->members_.emplace(key, value(depth + 1)).second) fail("duplicate key \"" + key + "\"");
      space();
      if (peek() != ',') break;
      pos_++;
    }
    expect('}');
  }

  void array(Json* v, int depth) {
    v->type_ = Json::Type::array;
    expect('[');
    space();
    if (peek() == ']') {
      pos_++;
      return;
    }
    for (;;) {
      v->items_.push_back(value(depth + 1));
      space();
      if (peek() != ',') break;
      pos_++;
    }
    expect(']');
  }

  uint32_t hex4() {
    uint32_t n = 0;
    for (int i = 0; i < 4; i++, pos_++) {
      const char c = peek();
      if (digit(c)) {
        n = n * 16 + uint32_t(c - '0');
      } else if ((c | 32) >= 'a' && (c | 32) <= 'f') {
        n = n * 16 + uint32_t((c | 32) - 'a' + 10);
      } else {
        fail("four hexadecimal digits must follow \\u");
      }
    }
    return n;
  }

  std::string string() {
    expect('"');
    std::string out;
    for (;;) {
      if (pos_ >= text_.size()) fail("string without end");
      const uint8_t c = uint8_t(text_[pos_]);
      if (c == '"') break;
      if (c < 0x20) fail("control character in a string");
      if (c != '\\') {
        const size_t n = utf8_length(text_.substr(pos_, 4));
        if (n == 0) fail("not UTF-8");
        out.append(text_, pos_, n);
        pos_ += n;
        continue;
      }
      pos_++;
      const char e = peek();
      if (pos_ < text_.size()) pos_++;
      switch (e) {
        case '"': case '\\': case '/': out += e; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'n': out += '\n'; break;
        case 'r': out += '\r'; break;
        case 't': out += '\t'; break;
        case 'u': {
          uint32_t code = hex4();
          if (code >= 0xdc00 && code <= 0xdfff) fail("lone surrogate");
          if (code >= 0xd800 && code <= 0xdbff) {
            if (text_.substr(pos_, 2) != "\\u") fail("lone surrogate");
            pos_ += 2;
            const uint32_t low = hex4();
            if (low < 0xdc00 || low > 0xdfff) fail("lone surrogate");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
          }
          append_utf8(&out, code);
          break;
        }
        default: fail("unknown escape");
      }
    }
    pos_++;
    return out;
  }

  void number(Json* v) {
    const size_t begin = pos_;
    bool integral = true;
    if (peek() == '-') pos_++;
    if (!digit(peek())) fail("expected a value");
    if (peek() == '0') {
      pos_++;
    } else {
      while (digit(peek())) pos_++;
    }
    if (peek() == '.') {
      integral = false;
      pos_++;
      if (!digit(peek())) fail("digits must follow the point");
      while (digit(peek())) pos_++;
    }
    if ((peek() | 32) == 'e') {
      integral = false;
      pos_++;
      if (peek() == '+' || peek() == '-') pos_++;
      if (!digit(peek())) fail("digits must follow the exponent");
      while (digit(peek())) pos_++;
    }
    const std::string_view text = text_.substr(begin, pos_ - begin);
    bool ok = true;
    v->type_ = Json::Type::number;
    v->number_ = to_double(text, &ok);
    if (!ok || !std::isfinite(v->number_)) fail("number out of range");
    if (integral) {
      const auto r = std::from_chars(text.data(), text.data() + text.size(), v->integer_);
      v->integral_ = r.ec == std::errc();
    }
  }

  std::string_view text_;
  size_t pos_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

bool Json::as_bool() const {
  if (!is_bool()) throw JsonError("must be true or false");
  return bool_;
}
double Json::as_number() const {
  if (!is_number()) throw JsonError("must be a number");
  return number_;
}
int64_t Json::as_integer() const {
  if (!is_integer()) throw JsonError("must be an integer");
  return integer_;
}
const std::string& Json::as_string() const {
  if (!is_string()) throw JsonError("must be a string");
  return string_;
}
const std::vector<Json>& Json::items() const {
  if (!is_array()) throw JsonError("must be a list");
  return items_;
}
const std::map<std::string, Json>& Json::members() const {
  if (!is_object()) throw JsonError("must be an object");
  return members_;
}
const Json* Json::find(const std::string& key) const {
  if (!is_object()) return nullptr;
  const auto it = members_.find(key);
  return it == members_.end() ? nullptr : &it->second;
}

}  // namespace sr
