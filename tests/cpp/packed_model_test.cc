// A sound packed model opens; a damaged one is refused with the file, the fault and the remedy, never with a crash.
#include "format/packed_model.h"

#include <random>

#include "check.h"
#include "model/decoder_config.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"
#include "tiny_model.h"

using sr::Error;
using sr::ErrorCode;
using sr_test::TinyModel;
using sr_test::TinySpec;

namespace {

// Opens the whole model; returns the error's text, empty when it opened.
std::string open_error(const std::string& path, ErrorCode* code = nullptr) {
  try {
    sr::ModelOptions options;
    options.path = path;
    options.threads = 1;
    sr::Model model(options);
  } catch (const Error& e) {
    if (code) *code = e.code();
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  return at == std::string::npos ? "not there: " + from : text.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("packed model: a sound one opens, its sizes are those of its tensors") {
  const TinyModel tiny{TinySpec()};
  CHECK_EQ(open_error(tiny.path()), "");
  const sr::PackedModel model(tiny.path());
  CHECK(model.has_matrix("layers.1.attn_qkv"));
  CHECK(!model.has_matrix("layers.2.attn_qkv"));
  const auto parts = model.matrix("layers.0.attn_o", 96, 64);
  CHECK_EQ(parts.size(), size_t(1));
  CHECK_EQ(parts[0].rows, 96);
  CHECK(parts[0].has_min);
  CHECK(model.vector("layers.0.post_attn_norm", {96}, false) == nullptr);
  CHECK_THROWS(model.vector("layers.0.attn_norm", {95}, true), Error, "expected F32 [95]");
  CHECK_THROWS(model.matrix("nothing", 1, 1), Error, "nothing is missing");
}

TEST_CASE("packed model: missing and unreadable files are named") {
  ErrorCode code = ErrorCode::runtime;
  CHECK(has(open_error("/nonexistent/model", &code), "/nonexistent/model/config.json"));
  CHECK(code == ErrorCode::model);
  TinyModel tiny{TinySpec()};
  tiny.write_raw("weights.safetensors", "");
  CHECK(has(open_error(tiny.path(), &code), "weights.safetensors: the file is empty"));
  CHECK(code == ErrorCode::model);
}

TEST_CASE("packed model: every truncation of the weights is refused") {
  TinyModel tiny{TinySpec()};
  const std::string sound = tiny.weights().bytes();
  std::mt19937 rng(3);
  for (int i = 0; i < 200; i++) {
    const size_t keep = i < 20 ? size_t(i) : rng() % (sound.size() - 4096);
    tiny.write_raw("weights.safetensors", sound.substr(0, keep));
    ErrorCode code = ErrorCode::runtime;
    const std::string error = open_error(tiny.path(), &code);
    CHECK(has(error, "weights.safetensors"));
    CHECK(code == ErrorCode::model);
  }
}

TEST_CASE("packed model: random damage to the header is refused or harmless") {
  TinyModel tiny{TinySpec()};
  const std::string sound = tiny.weights().bytes();
  const size_t header = sound.find("   ");  // the padding after the JSON text
  std::mt19937 rng(5);
  int refused = 0;
  for (int i = 0; i < 1000; i++) {
    std::string bytes = sound;
    for (int k = 0; k < 2; k++) bytes[rng() % header] = char(rng() % 256);
    tiny.write_raw("weights.safetensors", bytes);
    refused += !open_error(tiny.path()).empty();
  }
  CHECK(refused > 700);
}

TEST_CASE("packed model: faults of the header are told apart") {
  TinyModel tiny{TinySpec()};
  const std::string sound = tiny.weights().bytes();
  const auto error_with = [&](const std::string& from, const std::string& to) {
    tiny.write_raw("weights.safetensors", replaced(sound, from, to));
    return open_error(tiny.path());
  };
  std::string huge = sound;
  huge[5] = char(0x7f);
  tiny.write_raw("weights.safetensors", huge);
  CHECK(has(open_error(tiny.path()), "header is longer than the file"));
  CHECK(has(error_with("\"data_offsets\":[0,", "\"data_offsets\":[9,"), "does not fit its size"));
  CHECK(has(error_with("\"F32\"", "\"F33\""), "unknown type F33"));
  CHECK(has(error_with("\"F32\"", "\"I32\""), "expected F32"));
  CHECK(has(error_with("\"U8\",\"shape\":[", "\"U8\",\"shape\":[-"), "impossible shape"));
  CHECK(has(error_with("\\\"kind\\\": \\\"q4\\\"", "\\\"kind\\\": \\\"q3\\\""), "unknown kind"));
  CHECK(has(error_with("\\\"kind\\\": \\\"q4\\\"", "\\\"kind\\\": \\\"q8\\\""), "its layout needs"));
  CHECK(has(error_with("\\\"group\\\": 32", "\\\"group\\\": 31"), "impossible group"));
  CHECK(has(error_with("\\\"panel_rows\\\": 128", "\\\"panel_rows\\\": 100"), "impossible panel_rows"));
  CHECK(has(error_with("\\\"version\\\": 1", "\\\"version\\\": 2"), "layout that this program does not know"));
  CHECK(has(error_with("\\\"version\\\": 1", "\\\"version\\\": 2, \\\"superblock\\\": 96"), "impossible superblock"));
  CHECK(has(error_with("\"layout:token_embd\"", "\"layout:token_emb_\""), "token_embd has no layout"));
  CHECK(has(open_error(tiny.path()), "convert it again"));
}

TEST_CASE("packed model: a missing tensor is named") {
  for (const char* name :
       {"token_embd", "output_norm", "layers.1.attn_qkv", "layers.0.ffn_down", "layers.0.ffn_norm"}) {
    TinyModel tiny{TinySpec()};
    tiny.weights().tensors.erase(name);
    tiny.write();
    const std::string error = open_error(tiny.path());
    CHECK(has(error, std::string("tensor ") + name + " is missing"));
  }
}

TEST_CASE("packed model: impossible configurations are refused by key") {
  TinyModel tiny{TinySpec()};
  const std::string sound = tiny.config();
  const auto error_with = [&](const std::string& from, const std::string& to) {
    tiny.config() = replaced(sound, from, to);
    tiny.write();
    return open_error(tiny.path());
  };
  CHECK(has(error_with("\"format_version\": 1", "\"format_version\": 2"), "packed model format 2"));
  CHECK(has(error_with("\"format_version\": 1, ", ""), "not a packed model"));
  CHECK(has(error_with("\"n_layers\": 2", "\"n_layers\": 0"), "n_layers must be"));
  CHECK(has(error_with("\"n_layers\": 2", "\"n_layers\": 3"), "layers.2.attn_norm is missing"));
  CHECK(has(error_with("\"n_layers\": 2", "\"n_layers\": 1e9"), "n_layers must be an integer"));
  CHECK(has(error_with("\"n_heads\": 4", "\"n_heads\": 3"), "multiple of n_kv_heads"));
  CHECK(has(error_with("\"n_heads\": 4", "\"n_heads\": 99999999999"), "n_heads must be"));
  CHECK(has(error_with("\"head_dim\": 16", "\"head_dim\": 12"), "multiple of 8"));
  CHECK(has(error_with("\"n_ff\": 192", "\"n_ff\": 191"), "multiple of 64"));
  CHECK(has(error_with("\"n_embd\": 96", "\"n_embd\": 97"), "the configuration says"));
  CHECK(has(error_with("\"silu\"", "\"swish\""), "unknown value \"swish\""));
  CHECK(has(error_with("\"norm_eps\": 1e-5", "\"norm_eps\": -1"), "norm_eps is out of range"));
  CHECK(has(error_with("\"tied_embeddings\": true", "\"tied_embeddings\": 1"), "tied_embeddings must be"));
  CHECK(has(error_with("\"tied_embeddings\": true", "\"window\": [1]"), "window must be a list"));
  CHECK(has(error_with("{", ""), "invalid JSON"));
  CHECK(has(open_error(tiny.path()), "config.json"));
}

TEST_CASE("packed model: bad options are refused") {
  const TinyModel tiny{TinySpec()};
  sr::ModelOptions options;
  options.path = tiny.path();
  options.threads = -1;
  CHECK_THROWS(sr::Model(options), Error, "threads");
  options.threads = 100000;
  CHECK_THROWS(sr::Model(options), Error, "threads");
}
