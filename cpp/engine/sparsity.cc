// The public thresholds handle.
#include "engine/sparsity_impl.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

Site site_of(const std::string& name) {
  for (int i = 0; i < kSites; i++)
    if (name == kSiteNames[i]) return Site(i);
  throw Error(ErrorCode::usage, "unknown site '" + name + "'; thresholds are for A, O, M, Z and G");
}

}  // namespace

Sparsity::Sparsity(const Model& model, int dense_tokens) {
  const Decoder& d = model.impl_->decoder;
  std::array<int, kSites> widths;
  for (int i = 0; i < kSites; i++) widths[size_t(i)] = d.site_width(Site(i));
  impl_ = std::shared_ptr<Impl>(new Impl{model.impl_, SparsityPlan(d.config().n_layers, widths, dense_tokens)});
}

void Sparsity::set(const std::string& site, int layer, const float* thresholds, size_t n) {
  const Site s = site_of(site);
  if (layer < 0 || layer >= impl_->plan.n_layers()) {
    throw Error(ErrorCode::usage, "layer " + std::to_string(layer) + " is not one of this model's " +
                                      std::to_string(impl_->plan.n_layers()));
  }
  const std::string why = impl_->model->decoder.site_refusal(layer, s);
  if (!why.empty()) throw Error(ErrorCode::usage, "site " + site + " of layer " + std::to_string(layer) + " " + why);
  impl_->plan.set(layer, s, thresholds, n);
}

void Sparsity::set_break_even(const std::string& site, float break_even) {
  impl_->plan.set_break_even(site_of(site), break_even);
}

float Sparsity::break_even(const std::string& site) const {
  const Site s = site_of(site);
  const float set = impl_->plan.break_even(s);
  return set != SparsityPlan::kByShape ? set : impl_->model->decoder.break_even(s);
}

int Sparsity::dense_tokens() const { return impl_->plan.dense_tokens(); }

}  // namespace sr
