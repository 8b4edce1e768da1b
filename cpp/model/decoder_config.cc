// Reads config.json; whatever the kernels rely on (divisibility, ranges) is established here.
#include "model/decoder_config.h"

#include <cmath>
#include <string>
#include <utility>

#include "format/packed_model.h"

namespace sr {
namespace {

class Reader {
 public:
  explicit Reader(const PackedModel& model) : model_(model) {}

  int integer(const char* key, int64_t least, int64_t most) const {
    const Json* v = model_.config().find(key);
    if (!v) model_.bad_config(key, "is missing");
    if (!v->is_integer()) model_.bad_config(key, "must be an integer");
    if (v->as_integer() < least || v->as_integer() > most) {
      model_.bad_config(key, "must be from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return int(v->as_integer());
  }
  double number(const char* key, double absent, double least, double most) const {
    const Json* v = model_.config().find(key);
    if (!v || v->type() == Json::Type::null) return absent;
    if (!v->is_number()) model_.bad_config(key, "must be a number");
    if (!(v->as_number() >= least && v->as_number() <= most)) model_.bad_config(key, "is out of range");
    return v->as_number();
  }
  bool flag(const char* key, bool absent) const {
    const Json* v = model_.config().find(key);
    if (!v || v->type() == Json::Type::null) return absent;
    if (!v->is_bool()) model_.bad_config(key, "must be true or false");
    return v->as_bool();
  }
  template <class T, size_t N>
  T choice(const char* key, const std::pair<const char*, T> (&names)[N], const T* absent = nullptr) const {
    const Json* v = model_.config().find(key);
    if (!v && absent) return *absent;
    if (!v || !v->is_string()) model_.bad_config(key, "is missing");
    for (const auto& n : names) {
      if (v->as_string() == n.first) return n.second;
    }
    model_.bad_config(key, "has the unknown value \"" + v->as_string() + "\"");
  }
  // A list of n values read by `get`, or n times `absent`.
  template <class T, class Get>
  std::vector<T> list(const char* key, int n, T absent, Get get) const {
    const Json* v = model_.config().find(key);
    if (!v || v->type() == Json::Type::null) return std::vector<T>(size_t(n), absent);
    if (!v->is_array() || v->items().size() != size_t(n)) model_.bad_config(key, "must be a list of n_layers values");
    std::vector<T> out;
    for (const Json& item : v->items()) out.push_back(get(item));
    return out;
  }

 private:
  const PackedModel& model_;
};

constexpr std::pair<const char*, NormKind> kNorms[] = {{"rms", NormKind::rms}, {"layer", NormKind::layer}};
constexpr std::pair<const char*, Activation> kActivations[] = {{"silu", Activation::silu},
                                                               {"gelu_tanh", Activation::gelu_tanh},
                                                               {"gelu", Activation::gelu},
                                                               {"relu", Activation::relu},
                                                               {"relu2", Activation::relu2}};
constexpr std::pair<const char*, RopeStyle> kRopes[] = {
    {"none", RopeStyle::none}, {"interleaved", RopeStyle::interleaved}, {"half", RopeStyle::half}};
constexpr std::pair<const char*, QkNorm> kQkNorms[] = {{"head", QkNorm::head}, {"full", QkNorm::full}};

}  // namespace

DecoderConfig read_decoder_config(const PackedModel& model) {
  const Reader r(model);
  DecoderConfig c;
  c.n_layers = r.integer("n_layers", 1, 4096);
  c.n_embd = r.integer("n_embd", 1, 1 << 18);
  c.n_heads = r.integer("n_heads", 1, 4096);
  c.n_kv_heads = r.integer("n_kv_heads", 1, 4096);
  c.head_dim = r.integer("head_dim", 8, 1024);
  c.n_ff = r.integer("n_ff", kTileRows, 1 << 22);
  c.n_vocab = r.integer("n_vocab", 1, 1 << 24);
  c.n_ctx_train = r.integer("n_ctx_train", 1, 1 << 26);
  if (c.n_heads % c.n_kv_heads) model.bad_config("n_heads", "must be a multiple of n_kv_heads");
  if (c.head_dim % 8) model.bad_config("head_dim", "must be a multiple of 8");
  if (c.n_ff % kTileRows) model.bad_config("n_ff", "must be a multiple of 64");

  c.norm = r.choice("norm", kNorms);
  c.norm_eps = float(r.number("norm_eps", 1e-5, 0, 1));
  c.activation = r.choice("activation", kActivations);
  c.activation_threshold = float(r.number("activation_threshold", 0, 0, 1e9));
  c.ffn_gated = r.flag("ffn_gated", true);
  c.up_relu = r.flag("up_relu", false);
  if (c.up_relu && !c.ffn_gated) model.bad_config("up_relu", "needs a gated FFN");
  c.qk_norm = r.choice("qk_norm", kQkNorms, &c.qk_norm);

  c.rope_style = r.choice("rope_style", kRopes);
  if (c.rope_style != RopeStyle::none) {
    c.rope_dims = model.config().find("rope_dims") ? r.integer("rope_dims", 2, c.head_dim) : c.head_dim;
    if (c.rope_dims % 2) model.bad_config("rope_dims", "must be even");
  }
  c.rope_theta = r.number("rope_theta", 10000, 1, 1e12);
  c.rope_theta_local = r.number("rope_theta_local", c.rope_theta, 1, 1e12);
  c.rope_mscale = float(r.number("rope_mscale", 1, 1e-3, 1e3));
  c.rope_mscale_local = float(r.number("rope_mscale_local", c.rope_mscale, 1e-3, 1e3));

  if (model.config().find("rope_long_context")) c.rope_long_context = r.integer("rope_long_context", 1, 1 << 30);

  c.attn_scale = float(r.number("attn_scale", 1 / std::sqrt(double(c.head_dim)), -1e6, 1e6));
  c.attn_softcap = float(r.number("attn_softcap", 0, 0, 1e9));
  c.logit_softcap = float(r.number("logit_softcap", 0, 0, 1e9));
  c.embedding_scale = float(r.number("embedding_scale", 1, -1e9, 1e9));
  c.residual_scale = float(r.number("residual_scale", 1, -1e9, 1e9));
  c.logit_scale = float(r.number("logit_scale", 1, -1e9, 1e9));

  c.window = r.list<int>("window", c.n_layers, 0, [&](const Json& v) {
    if (!v.is_integer() || v.as_integer() < 0 || v.as_integer() > (1 << 30)) {
      model.bad_config("window", "must hold integers from 0 on");
    }
    return int(v.as_integer());
  });
  c.rope_layers = r.list<bool>("rope_layers", c.n_layers, true, [&](const Json& v) {
    if (!v.is_bool()) model.bad_config("rope_layers", "must hold true and false");
    return v.as_bool();
  });
  c.pre_norms = r.flag("pre_norms", true);
  c.parallel_block = r.flag("parallel_block", false);
  c.tied_embeddings = r.flag("tied_embeddings", false);
  return c;
}

}  // namespace sr
