// The JSON reader takes what RFC 8259 allows and refuses everything else without crashing.
#include "base/json.h"

#include <random>
#include <string>

#include "check.h"

using sr::Json;
using sr::JsonError;

TEST_CASE("json: values of every type are read") {
  const Json j = Json::parse(R"( {"a": [1, -2.5e3, true, false, null], "b": {"c": "x"}, "": 0} )");
  CHECK(j.is_object());
  const auto& a = j.find("a")->items();
  CHECK_EQ(a.size(), size_t(5));
  CHECK_EQ(a[0].as_integer(), 1);
  CHECK(!a[1].is_integer());
  CHECK_EQ(a[1].as_number(), -2500.0);
  CHECK(a[2].as_bool());
  CHECK(!a[3].as_bool());
  CHECK(a[4].type() == Json::Type::null);
  CHECK_EQ(j.find("b")->find("c")->as_string(), "x");
  CHECK(j.find("none") == nullptr);
  CHECK(a[0].find("none") == nullptr);
}

TEST_CASE("json: strings are unescaped to UTF-8") {
  CHECK_EQ(Json::parse(R"("a\"\\\/\b\f\n\r\tz")").as_string(), "a\"\\/\b\f\n\r\tz");
  CHECK_EQ(Json::parse(R"("\u0041\u00e9\u20ac\ud83d\ude00")").as_string(), "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  CHECK_EQ(Json::parse("\"\xc3\xa9\"").as_string(), "\xc3\xa9");
  CHECK_EQ(Json::parse("\"\\u0000\"").as_string(), std::string(1, '\0'));
}

TEST_CASE("json: integers are exact up to 64 bits, and only then integers") {
  CHECK_EQ(Json::parse("9223372036854775807").as_integer(), INT64_MAX);
  CHECK_EQ(Json::parse("-9223372036854775808").as_integer(), INT64_MIN);
  CHECK(!Json::parse("9223372036854775808").is_integer());
  CHECK(Json::parse("9223372036854775808").is_number());
  CHECK_THROWS(Json::parse("1.0").as_integer(), JsonError, "integer");
}

TEST_CASE("json: wrong types are errors, not defaults") {
  const Json j = Json::parse("[]");
  CHECK_THROWS(j.as_bool(), JsonError, "true or false");
  CHECK_THROWS(j.as_number(), JsonError, "number");
  CHECK_THROWS(j.as_string(), JsonError, "string");
  CHECK_THROWS(j.members(), JsonError, "object");
  CHECK_THROWS(Json::parse("{}").items(), JsonError, "list");
}

TEST_CASE("json: malformed text is refused with the byte where it goes wrong") {
  for (const char* bad :
       {"", " ", "{", "[", "]", "{]", "[1,]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{a:1}", "tru", "nul", "+1", "01",
        "-", "1.", ".5", "1e", "1e+", "0x10", "NaN", "Infinity", "1e999", "-1e999", "\"", "\"\\\"", "\"\\x\"",
        "\"\\u12\"", "\"\\u12g4\"", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\n\"", "1 2", "{} x",
        "[1 2]", "{\"a\":1,\"a\":2}", "'a'", "\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf5\x80\x80\x80\"",
        "\"\xc3\"", "\"\xe2\x82\"", "// c\n1"}) {
    CHECK_THROWS(Json::parse(bad), JsonError, "invalid JSON at byte ");
  }
  CHECK_THROWS(Json::parse(std::string("1\0", 2)), JsonError, "after the value");
}

TEST_CASE("json: nesting is bounded") {
  CHECK_THROWS(Json::parse(std::string(1000000, '[')), JsonError, "nested too deeply");
  std::string objects;
  for (int i = 0; i < 100000; i++) objects += "{\"a\":";
  CHECK_THROWS(Json::parse(objects), JsonError, "nested too deeply");
  CHECK(Json::parse(std::string(60, '[') + std::string(60, ']')).is_array());
}

TEST_CASE("json: random damage to a sound text never does worse than an error") {
  const std::string sound =
      R"({"__metadata__": {"x": "\u00e9\n"}, "t": {"dtype": "F32", "shape": [2, 3], "n": -1.5e-3}})";
  std::mt19937 rng(7);
  int refused = 0;
  for (int i = 0; i < 20000; i++) {
    std::string text = sound;
    for (int k = 0; k < 3; k++) text[rng() % text.size()] = char(rng() % 256);
    if (i % 2) text.resize(rng() % text.size());
    try {
      Json::parse(text);
    } catch (const JsonError&) {
      refused++;
    }
  }
  CHECK(refused > 10000);
}
