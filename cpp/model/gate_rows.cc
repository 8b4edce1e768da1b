// In the file the gate rows of 64 neurons lie together, before their up rows: what stays is copied into memory of its
// own, without gaps, and the rest is streamed block by block.
#include "model/gate_rows.h"

#include <algorithm>
#include <utility>

#include "flash/read_group.h"
#include "format/packed_model.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

static_assert(kNeuronBlock == kTileRows, "threads share neurons by blocks");
constexpr size_t kUnit = size_t(1) << 20;  // that is awaited at once
constexpr size_t kRing = size_t(6) << 20;

size_t blocks_of_unit(size_t block_bytes) { return std::max<size_t>(1, kUnit / block_bytes); }

}  // namespace

GateRows::GateRows(const PackedModel& model, const DecoderWeights& w) : form_(w.layers[0].ffn_rows.m) {
  stride_ = size_t(kNeuronBlock) * form_.record_bytes();
  form_.gated = false;
  block_bytes_ = size_t(kNeuronBlock) * form_.record_bytes();
  for (const LayerWeights& l : w.layers) {
    offsets_.push_back(uint64_t(l.ffn_rows.m.data - model.weights().file().data()));
  }
}

std::string GateRows::refusal() const {
  const bool whole = std::all_of(offsets_.begin(), offsets_.end(), [](uint64_t o) { return o % kReadAlign == 0; });
  return whole && block_bytes_ % kReadAlign == 0 ? "" : "its gate rows do not lie in whole blocks of the file";
}

size_t GateRows::bytes(int64_t blocks) const {
  const size_t ring = blocks == all_blocks() ? 0 : std::max(kRing, 2 * blocks_of_unit(block_bytes_) * block_bytes_);
  return size_t(blocks) * block_bytes_ + ring + 4 * kReadAlign;
}

int GateRows::resident_of(int layer) const {
  const int64_t layers = int64_t(offsets_.size());
  return int(blocks_ * (layer + 1) / layers - blocks_ * layer / layers);
}

void GateRows::open(int64_t blocks, int threads, std::shared_ptr<ReadQueue> queue, const LoadProgress& progress) {
  queue_ = std::move(queue);
  blocks_ = blocks;
  memory_ = std::make_shared<AlignedBuffer<uint8_t>>(resident_bytes() + 2 * kReadAlign, "gate rows");
  prefer_huge_pages(memory_->data(), memory_->size());
  uint8_t* to = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(memory_->data())));
  const int per_layer = form_.neurons / kNeuronBlock, together = int(blocks_of_unit(block_bytes_));
  ReadGroup reads(queue_.get());
  std::vector<StreamUnit> units;
  layers_.resize(offsets_.size());
  for (size_t l = 0; l < layers_.size(); l++) {
    Layer& layer = layers_[l];
    const auto add = [&](int begin, int end, int unit) {
      layer.slices.push_back({begin, end, unit, even_share(begin, end, threads, 1)});
      layer.places.push_back(form_);
    };
    const int kept = resident_of(int(l));
    if (kept > 0) {
      add(0, kept, -1);
      layer.places.back().data = to;
      for (int b = 0; b < kept; b++, to += block_bytes_) {
        reads.submit(offsets_[l] + uint64_t(b) * stride_, block_bytes_, to, memory_);
      }
    }
    for (int begin = kept; begin < per_layer; begin += together) {
      const int end = std::min(begin + together, per_layer);
      add(begin, end, int(units.size()));
      units.push_back({offsets_[l] + uint64_t(begin) * stride_, block_bytes_, end - begin, stride_});
    }
  }
  const int64_t before = queue_->stats().bytes;
  const std::string error = reads.wait(
      [&] { return progress && progress(size_t(queue_->stats().bytes - before), resident_bytes()); });
  if (error == "cancelled") throw Error(ErrorCode::cancelled, error);
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
  if (units.empty()) return;
  stream_ = std::make_unique<WeightStream>(queue_, std::move(units),
                                           std::max(kRing, 2 * size_t(together) * block_bytes_), threads);
  for (Layer& layer : layers_) {
    for (size_t i = 0; i < layer.slices.size(); i++) {
      const Slice& s = layer.slices[i];
      if (s.unit < 0) continue;
      const uintptr_t at = reinterpret_cast<uintptr_t>(stream_->address(s.unit));
      layer.places[i].data = reinterpret_cast<const uint8_t*>(at - size_t(s.tile_begin) * block_bytes_);
    }
  }
}

std::string GateRows::end_pass() {
  if (!stream_) return "";
  std::string error = stream_->end_pass();
  return error.empty() ? change_of(queue_->source()) : error;
}

}  // namespace sr
