// A strict JSON reader for untrusted files: bounded depth, valid UTF-8, no duplicate keys, no trailing text.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sr {

// The text says what is wrong and at which byte.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  enum class Type : uint8_t { null, boolean, number, string, array, object };

  // Throws JsonError. Depth of nesting at most 64.
  static Json parse(std::string_view text);

  Type type() const { return type_; }
  bool is_object() const { return type_ == Type::object; }
  bool is_array() const { return type_ == Type::array; }
  bool is_string() const { return type_ == Type::string; }
  bool is_number() const { return type_ == Type::number; }
  bool is_bool() const { return type_ == Type::boolean; }
  // A number written without fraction or exponent that fits int64.
  bool is_integer() const { return is_number() && integral_; }

  // Each throws JsonError when the value is of another type.
  bool as_bool() const;
  double as_number() const;
  int64_t as_integer() const;
  const std::string& as_string() const;
  const std::vector<Json>& items() const;
  const std::map<std::string, Json>& members() const;

  // The member of an object, or null when it is absent.
  const Json* find(const std::string& key) const;

 private:
  friend class JsonParser;
  Type type_ = Type::null;
  bool integral_ = false;
  bool bool_ = false;
  int64_t integer_ = 0;
  double number_ = 0;
  std::string string_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

}  // namespace sr
