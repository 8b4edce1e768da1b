// One small model for each thing that families of decoders differ in, in both layouts of the FFN.
#pragma once

#include <string>
#include <vector>

#include "tiny_model.h"

namespace sr_test {

struct Named {
  std::string name;
  TinySpec spec;
};

inline std::vector<Named> variants() {
  std::vector<Named> v;
  const auto add = [&](const char* name, auto set) {
    TinySpec s;
    set(s);
    v.push_back({name, s});
  };
  add("q4 with minima", [](TinySpec&) {});
  add("q4 in groups of 16", [](TinySpec& s) { s.group = 16; });
  add("scales that are products", [](TinySpec& s) {
    s.units = true;
    s.kinds = {{"attn_o", "q6"}, {"ffn_down", "q5"}};
  });
  add("q8", [](TinySpec& s) { s.kind = "q8"; s.has_min = false; });
  add("f32", [](TinySpec& s) { s.kind = "f32"; });
  add("f16 and bf16", [](TinySpec& s) { s.kind = "f16"; s.kinds = {{"ffn", "bf16"}}; });
  add("mixed, q k v in parts of odd heights", [](TinySpec& s) {
    s.n_heads = 3;
    s.n_kv_heads = 1;
    s.head_dim = 24;
    s.qkv_in_parts = true;
    s.kinds = {{"attn_qkv.1", "q6"}, {"attn_qkv.2", "f16"}, {"ffn_down", "q5"}, {"attn_o", "f32"}};
  });
  add("Gemma-like", [](TinySpec& s) {
    s.post_norms = s.qk_norm = true;
    s.activation = "gelu_tanh";
    s.rope_style = "half";
    s.head_dim = 32;
    s.more = "\"window\": [40, 0], \"rope_theta_local\": 1000, \"embedding_scale\": 9.8, \"attn_softcap\": 5, "
             "\"logit_softcap\": 3, \"attn_scale\": 0.2, ";
  });
  add("OPT-like", [](TinySpec& s) {
    s.norm = "layer";
    s.activation = "relu";
    s.rope_style = "none";
    s.gated = false;
    s.biases = s.positions = true;
    s.tied = false;
    s.n_kv_heads = s.n_heads;
  });
  add("Falcon-like, partial rotation, scales", [](TinySpec& s) {
    s.parallel = s.biases = true;
    s.gated = false;
    s.norm = "layer";
    s.activation = "gelu";
    s.rope_factors = true;
    s.rope_style = "half";
    s.more = "\"rope_dims\": 16, \"residual_scale\": 0.5, \"logit_scale\": 2, \"rope_mscale\": 1.1, "
             "\"rope_layers\": [true, false], ";
    s.kind = "q6";
  });
  add("parallel, float q k v, quantised FFN", [](TinySpec& s) {
    s.parallel = true;
    s.kinds = {{"attn_qkv", "f32"}};
    s.activation = "relu2";
  });
  add("OLMo-like: no norms before, norms of all heads together", [](TinySpec& s) {
    s.pre_norms = false;
    s.post_norms = s.qk_norm = s.full_qk_norm = true;
    s.rope_style = "half";
    s.qkv_in_parts = true;
    s.kinds = {{"attn_qkv.1", "q6"}};
  });
  add("BitNet-like: norms before o and down", [](TinySpec& s) {
    s.sub_norms = true;
    s.activation = "relu2";
  });
  add("parallel with two norms, 35 queries a key", [](TinySpec& s) {
    s.parallel = s.two_norms = true;
    s.n_heads = 70;
    s.head_dim = 8;
    s.norm = "layer";
  });
  add("wide enough for stretches of columns, parts of different bits", [](TinySpec& s) {
    s.n_embd = 320;
    s.n_ff = 6592;
    s.n_heads = 9;
    s.n_kv_heads = 3;
    s.head_dim = 32;
    s.qkv_in_parts = s.biases = true;
    s.kinds = {{"attn_qkv.1", "q6"}, {"attn_o", "q8"}};
  });
  add("FATReLU, and a ReLU on up", [](TinySpec& s) {
    s.activation = "relu";
    s.more = "\"activation_threshold\": 0.3, \"up_relu\": true, ";
  });
  const size_t panels = v.size();
  for (size_t i = 0; i < panels; i++) {
    v.push_back(v[i]);
    v.back().name += ", by neuron";
    v.back().spec.neurons = true;
  }
  return v;
}

}  // namespace sr_test
