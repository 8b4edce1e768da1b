// Writes small random packed models (models/format.md) into a temporary folder that is removed with the object.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels/f16.h"
#include "kernels/pack/pack.h"
#include "kernels/pack/rows.h"

namespace sr_test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = "/tmp/sparse-run-test-XXXXXX";
    if (const char* tmp = std::getenv("TMPDIR")) pattern = std::string(tmp) + "/sparse-run-test-XXXXXX";
    std::vector<char> text(pattern.begin(), pattern.end());
    text.push_back(0);
    path_ = mkdtemp(text.data()) ? text.data() : "";
  }
  ~TemporaryFolder() {
    for (const std::string& file : files_) std::remove(file.c_str());
    rmdir(path_.c_str());
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string write(const std::string& name, const std::string& content) {
    const std::string file = path_ + "/" + name;
    std::ofstream(file, std::ios::binary) << content;
    if (std::find(files_.begin(), files_.end(), file) == files_.end()) files_.push_back(file);
    return file;
  }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

inline std::string json_escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

// A safetensors file under construction: every tensor at a multiple of 4096 bytes of the file.
struct SafetensorsText {
  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::string data;
  };
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;

  std::string bytes() const {
    std::string header = "{\"__metadata__\":{";
    bool comma = false;
    for (const auto& m : metadata) {
      header += std::string(comma ? "," : "") + "\"" + m.first + "\":\"" + json_escaped(m.second) + "\"";
      comma = true;
    }
    header += "}";
    size_t at = 0;
    for (const auto& t : tensors) {
      header += ",\"" + t.first + "\":{\"dtype\":\"" + t.second.dtype + "\",\"shape\":[";
      for (size_t i = 0; i < t.second.shape.size(); i++) header += (i ? "," : "") + std::to_string(t.second.shape[i]);
      header += "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + t.second.data.size()) + "]}";
      at = (at + t.second.data.size() + 4095) / 4096 * 4096;
    }
    header += "}";
    while ((header.size() + 8) % 4096) header += ' ';
    std::string out;
    for (int i = 0; i < 8; i++) out += char(uint64_t(header.size()) >> (8 * i) & 255);
    out += header;
    for (const auto& t : tensors) {
      out += t.second.data;
      while (out.size() % 4096) out += '\0';
    }
    return out;
  }
};

struct TinySpec {
  int n_layers = 2, n_embd = 96, n_heads = 4, n_kv_heads = 2, head_dim = 16, n_ff = 192, n_vocab = 197, n_ctx = 2048;
  std::string kind = "q4";       // of all matrices, unless `kinds` names one
  std::map<std::string, std::string> kinds;
  bool has_min = true;
  bool units = false;  // in panels, scales and minima are products
  int group = 32;
  bool neurons = false;          // what feeds the FFN is stored by neuron; the same weights
  std::string norm = "rms", activation = "silu", rope_style = "interleaved";
  bool gated = true, tied = true, biases = false, qk_norm = false, post_norms = false, parallel = false;
  bool qkv_in_parts = false, positions = false, rope_factors = false;
  bool pre_norms = true, two_norms = false, full_qk_norm = false, sub_norms = false;  // two: of a parallel block
  std::string more;              // further members of config.json, each followed by a comma
  uint32_t seed = 1;
};

class TinyModel {
 public:
  explicit TinyModel(const TinySpec& spec) : spec_(spec), rng_(spec.seed) {
    const TinySpec& s = spec_;
    matrix("token_embd", s.n_vocab, s.n_embd);
    if (!s.tied) matrix("output", s.n_vocab, s.n_embd);
    norm("output_norm", s.n_embd);
    if (s.positions) vector("position_embd", {s.n_ctx, s.n_embd}, 0.0f, 0.5f);
    if (s.rope_factors) vector("rope_factors", {s.head_dim / 2}, 2.0f, 0.5f);
    for (int i = 0; i < s.n_layers; i++) {
      const std::string at = "layers." + std::to_string(i) + ".";
      if (s.pre_norms) norm(at + "attn_norm", s.n_embd);
      if (s.pre_norms && (!s.parallel || s.two_norms)) norm(at + "ffn_norm", s.n_embd);
      if (s.post_norms) {
        norm(at + "post_attn_norm", s.n_embd);
        norm(at + "post_ffn_norm", s.n_embd);
      }
      if (s.qk_norm) {
        norm(at + "q_norm", s.full_qk_norm ? s.head_dim * s.n_heads : s.head_dim);
        norm(at + "k_norm", s.full_qk_norm ? s.head_dim * s.n_kv_heads : s.head_dim);
      }
      if (s.sub_norms) {
        norm(at + "attn_sub_norm", s.head_dim * s.n_heads);
        norm(at + "ffn_sub_norm", s.n_ff);
      }
      const int q = s.n_heads * s.head_dim, kv = s.n_kv_heads * s.head_dim;
      if (s.qkv_in_parts) {
        matrix(at + "attn_qkv.0", q, s.n_embd);
        matrix(at + "attn_qkv.1", kv, s.n_embd);
        matrix(at + "attn_qkv.2", kv, s.n_embd);
      } else {
        matrix(at + "attn_qkv", q + 2 * kv, s.n_embd);
      }
      matrix(at + "attn_o", s.n_embd, q);
      matrix(at + (s.gated ? "ffn_gate_up" : "ffn_up"), s.gated ? 2 * s.n_ff : s.n_ff, s.n_embd);
      matrix(at + "ffn_down", s.n_embd, s.n_ff);
      if (s.biases) {
        vector(at + "attn_qkv.bias", {q + 2 * kv}, 0.0f, 0.3f);
        vector(at + "attn_o.bias", {s.n_embd}, 0.0f, 0.3f);
        if (!s.gated) vector(at + "ffn_up.bias", {s.n_ff}, 0.0f, 0.3f);
        vector(at + "ffn_down.bias", {s.n_embd}, 0.0f, 0.3f);
      }
    }
    write();
  }

  const std::string& path() const { return folder_.path(); }
  SafetensorsText& weights() { return weights_; }
  std::string& config() { return config_; }
  // Writes the files again after a test has changed weights() or config().
  void write() {
    if (config_.empty()) config_ = config_text();
    folder_.write("config.json", config_);
    folder_.write("weights.safetensors", weights_.bytes());
  }
  void write_raw(const std::string& name, const std::string& bytes) { folder_.write(name, bytes); }

 private:
  float uniform() { return float(int(rng_() % 2001) - 1000) / 1000.0f; }

  void vector(const std::string& name, const std::vector<int64_t>& shape, float middle, float spread) {
    size_t n = 1;
    for (int64_t d : shape) n *= size_t(d);
    std::string data;
    for (size_t i = 0; i < n; i++) {
      const float v = middle + spread * uniform();
      data.append(reinterpret_cast<const char*>(&v), 4);
    }
    weights_.tensors[name] = {"F32", shape, data};
  }

  void norm(const std::string& name, int n) {
    vector(name, {n}, 1.0f, 0.3f);
    if (spec_.norm == "layer" && spec_.biases && n == spec_.n_embd) vector(name + ".bias", {n}, 0.0f, 0.2f);
  }

  void matrix(const std::string& name, int rows, int cols) {
    std::string kind = spec_.kind;
    for (const auto& k : spec_.kinds) {
      if (name.find(k.first) != std::string::npos) kind = k.second;
    }
    const sr::WeightKind k = sr::weight_kind_from_name(kind);
    const bool quantised = sr::is_quantised(k);
    const bool gate_up = name.find("ffn_gate_up") != std::string::npos;
    const bool by_neuron = spec_.neurons && (gate_up || name.find("ffn_up") != std::string::npos);
    const bool units = spec_.units && quantised && !by_neuron;
    const int panel_rows = quantised || by_neuron ? 128 : 64, group = spec_.group;
    const float spread = 1.7f / std::sqrt(float(cols));  // variance 1 / cols keeps activations of ordinary size
    std::string data;
    for (int r = 0; r < rows; r += panel_rows) {
      const int n = std::min(panel_rows, rows - r), groups = (cols + group - 1) / group;
      // Row i of a record's order stands at order[i]: 64 of gate are followed by 64 of up.
      std::vector<int> order;
      for (int i = 0; i < n; i++) order.push_back(by_neuron && gate_up ? i / 128 * 128 + i % 2 * 64 + i % 128 / 2 : i);
      sr::NeuronMatrix records;
      records.kind = k;
      records.has_min = quantised && spec_.has_min;
      records.group = group;
      records.gated = gate_up;
      records.neurons = gate_up ? n / 2 : n;
      records.cols = cols;
      const bool minima = quantised && spec_.has_min;
      std::string blob(by_neuron ? records.total_bytes()
                                 : sr::panel_bytes(k, n, cols, group, minima, units ? sr::kUnitSlabs : 0), '\0');
      auto* out = reinterpret_cast<uint8_t*>(&blob[0]);
      if (quantised) {
        const float top = float((1 << sr::code_bits(k)) - 1);
        std::vector<uint8_t> codes(size_t(n) * cols);
        std::vector<uint16_t> scales(size_t(n) * groups), mins(size_t(n) * groups);
        for (auto& c : codes) c = uint8_t(rng_() % uint32_t(top + 1));
        for (size_t i = 0; i < scales.size(); i++) {
          const float scale = 2 * spread / top * (1 + 0.3f * uniform());
          scales[i] = sr::f32_to_f16(scale);
          mins[i] = sr::f32_to_f16(-scale * top / 2 * (1 + 0.1f * uniform()));
        }
        const uint16_t* with_min = spec_.has_min ? mins.data() : nullptr;
        if (by_neuron) {
          codes = reordered(codes, order);
          scales = reordered(scales, order);
          mins = reordered(mins, order);
          sr::pack_neurons(records, codes.data(), scales.data(), spec_.has_min ? mins.data() : nullptr, out);
        } else if (units) {
          // Scales around the same, and minima near their middle.
          std::vector<int8_t> scale_codes(scales.size()), min_codes(scales.size());
          for (size_t i = 0; i < scales.size(); i++) {
            scale_codes[i] = int8_t(40 + rng_() % 24);
            min_codes[i] = int8_t(-scale_codes[i] + int(rng_() % 5) - 2);
          }
          std::vector<uint16_t> of_scales(size_t(n) * size_t((cols + 255) / 256)), of_mins(of_scales.size());
          for (size_t i = 0; i < of_scales.size(); i++) {
            const float unit = 2 * spread / top / 52 * (1 + 0.3f * uniform());
            of_scales[i] = sr::f32_to_f16(unit);
            of_mins[i] = sr::f32_to_f16(unit * top / 2);
          }
          const sr::UnitScales in_units = {scale_codes.data(), minima ? min_codes.data() : nullptr, of_scales.data(),
                                           of_mins.data()};
          sr::pack_panel(k, codes.data(), in_units, n, cols, group, out);
        } else {
          sr::pack_panel(k, codes.data(), scales.data(), with_min, n, cols, group, out);
        }
      } else {
        std::vector<float> values(size_t(n) * cols);
        for (auto& v : values) v = spread * uniform();
        if (by_neuron) sr::pack_neurons_float(records, reordered(values, order).data(), out);
        else sr::pack_panel_float(k, values.data(), n, cols, out);
      }
      data += blob;
    }
    const auto number = [](int v) { return std::to_string(v); };
    const auto flag = [](bool v) { return std::string(v ? "true" : "false"); };
    std::string layout = "{\"layout\": \"" + std::string(by_neuron ? "neurons" : "panels") +
                         (by_neuron || units ? "\", \"version\": 2" : "\", \"version\": 1") + ", \"kind\": \"" + kind +
                         "\", \"cols\": " + number(cols);
    if (by_neuron) layout += ", \"neurons\": " + number(gate_up ? rows / 2 : rows) + ", \"gated\": " + flag(gate_up);
    else layout += ", \"rows\": " + number(rows) + ", \"panel_rows\": " + number(panel_rows);
    if (quantised) layout += ", \"group\": " + number(group) + ", \"min\": " + flag(spec_.has_min);
    if (units) layout += ", \"superblock\": 256";
    weights_.metadata["layout:" + name] = layout + "}";
    weights_.tensors[name] = {"U8", {int64_t(data.size())}, data};
  }

  // Rows of `plain` in another order: row i is row order[i].
  template <class T>
  static std::vector<T> reordered(const std::vector<T>& plain, const std::vector<int>& order) {
    const size_t width = plain.size() / order.size();
    std::vector<T> out(plain.size());
    for (size_t i = 0; i < order.size(); i++) {
      std::copy_n(plain.begin() + ptrdiff_t(size_t(order[i]) * width), width, out.begin() + ptrdiff_t(i * width));
    }
    return out;
  }

  std::string config_text() const {
    const TinySpec& s = spec_;
    const auto flag = [](bool b) { return std::string(b ? "true" : "false"); };
    std::string c = "{" + s.more;
    const auto add = [&](const std::string& key, const std::string& value) { c += "\"" + key + "\": " + value + ", "; };
    const auto number = [&](const char* key, int v) { add(key, std::to_string(v)); };
    const auto text = [&](const char* key, const std::string& v) { add(key, "\"" + v + "\""); };
    number("format_version", 1);
    number("n_layers", s.n_layers);
    number("n_embd", s.n_embd);
    number("n_heads", s.n_heads);
    number("n_kv_heads", s.n_kv_heads);
    number("head_dim", s.head_dim);
    number("n_ff", s.n_ff);
    number("n_vocab", s.n_vocab);
    number("n_ctx_train", s.n_ctx);
    text("architecture", "tiny");
    text("norm", s.norm);
    text("activation", s.activation);
    text("rope_style", s.rope_style);
    if (s.full_qk_norm) text("qk_norm", "full");
    c += "\"pre_norms\": " + flag(s.pre_norms) + ", \"ffn_gated\": " + flag(s.gated) +
         ", \"parallel_block\": " + flag(s.parallel) + ", ";
    c += "\"tied_embeddings\": " + flag(s.tied) + ", \"norm_eps\": 1e-5}";
    return c;
  }

  TinySpec spec_;
  std::mt19937 rng_;
  TemporaryFolder folder_;
  SafetensorsText weights_;
  std::string config_;
};

}  // namespace sr_test
