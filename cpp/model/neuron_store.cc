// A slot's rows lie as those of a neuron of a small matrix do, its column beside those of other slots; scales of down,
// which belong to 32 columns together, stay in memory. So a product reads the same bytes in the same order as in the
// whole model.
#include "model/neuron_store.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kLine = 64;
constexpr size_t kBeyond = 256;  // what kernels may ask for beyond a column's end
constexpr int kFewSlots = 512;   // not worth being lent by themselves

bool same_form(const NeuronMatrix& a, const NeuronMatrix& b) {
  return a.kind == b.kind && a.has_min == b.has_min && a.group == b.group && a.cols == b.cols && a.gated == b.gated &&
         a.neurons == b.neurons;
}

}  // namespace

std::string NeuronStore::refusal(const DecoderWeights& w) {
  for (const LayerWeights& l : w.layers) {
    if (!l.ffn_rows) return "gate and up are not stored by neuron";
    if (l.ffn_sub_norm) return "the FFN has a norm inside";
    const bool plain = l.ffn_down.parts.size() == 1 && l.ffn_down.quantised && !l.ffn_down.floating;
    const bool same = same_form(l.ffn_rows.m, w.layers[0].ffn_rows.m) && plain &&
                      l.ffn_down.parts[0].kind == w.layers[0].ffn_down.parts[0].kind;
    if (!same) return "its layers are not stored alike, or in float";
  }
  return "";
}

NeuronStore::NeuronStore(const PackedModel& model, const DecoderWeights& w, std::shared_ptr<ByteSource> source,
                         bool by_gate)
    : source_(std::move(source)) {
  form_ = w.layers[0].ffn_rows.m;
  const PanelMatrix& down = w.layers[0].ffn_down.parts[0];
  column_bytes_ = (neuron_column_bytes(down) + kLine - 1) / kLine * kLine;
  shape_.layers = int(w.layers.size());
  shape_.neurons = form_.neurons;
  file_ = std::make_shared<NeuronFile>(source_, shape_.layers, shape_.neurons);
  shape_.bytes = neuron_record_bytes(form_, down);
  shape_.positions = file_->positions();
  for (int l = 0; l < shape_.layers; l++) {
    const LayerWeights& layer = w.layers[size_t(l)];
    file_->check(l, model, layer.ffn_rows.m, layer.ffn_down.parts[0]);
    shape_.offsets.push_back(file_->records(l).offset);
    if (shape_.stride && shape_.stride != file_->records(l).stride) {
      throw Error(ErrorCode::model,
                  source_->path() + ": its layers have records of different sizes; convert the model again");
    }
    shape_.stride = file_->records(l).stride;
    down_.push_back(layer.ffn_down);
  }
  if (!by_gate) return;
  // A record's first row is among the gates; slots hold what follows it. The next layer's neurons are not known
  // beforehand.
  gates_ = std::make_unique<GateRows>(model, w);
  for (uint64_t& offset : shape_.offsets) offset += form_.row_stride();
  shape_.bytes -= form_.row_stride();
  shape_.held = 1;
  has_rows_ = form_.gated;
  form_.gated = false;
}

size_t NeuronStore::bytes(int64_t slots) const {
  size_t heads = 0;
  for (int l = 0; l < shape_.layers; l++) heads += file_->records(l).heads_bytes + 3 * kReadAlign;
  const size_t blocks = has_rows_ ? size_t((slots + kNeuronBlock - 1) / kNeuronBlock) : 0;
  return heads + blocks * kNeuronBlock * form_.record_bytes() + size_t(slots) * column_bytes_ + kBeyond +
         NeuronPool::table_bytes(shape_, slots);
}

void NeuronStore::open(int slots, int more, int readers, size_t unit, const LoadProgress& progress) {
  base_ = slots;
  slots += more;
  queue_ = std::make_shared<ReadQueue>(source_, readers, unit);
  const Clock::time_point t0 = Clock::now();
  for (int l = 0; l < shape_.layers; l++) {
    const NeuronRecords& r = file_->records(l);
    heads_.emplace_back(size_t(align_up(r.heads_bytes)) + 2 * kReadAlign, "the scales of down");
    uint8_t* to = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(heads_.back().data())));
    const std::string error = read_fully(*source_, to, size_t(align_up(r.heads_bytes)), r.heads_offset);
    if (!error.empty()) throw Error(ErrorCode::runtime, error);
    down_[size_t(l)].parts[0].data = to;
  }
  memory_ = std::make_shared<Memory>();
  memory_->rows = form_;
  memory_->rows.neurons = has_rows_ ? slots : 0;
  memory_->has_rows = has_rows_;
  memory_->row_bytes = form_.row_stride();
  memory_->column_bytes = column_bytes_;
  memory_->of_rows.reset(memory_->rows.total_bytes(), "single neurons");
  memory_->of_columns.reset(size_t(slots) * column_bytes_ + kBeyond, "single neurons");
  memory_->rows.data = memory_->of_rows.data();
  prefer_huge_pages(memory_->of_rows.data(), memory_->of_rows.size());
  prefer_huge_pages(memory_->of_columns.data(), memory_->of_columns.size());
  for (Linear& w : down_) w.parts[0].runs = memory_->of_columns.data();
  const size_t column = neuron_column_bytes(down_[0].parts[0]);
  const auto place = [m = memory_, column](int slot, const uint8_t* record) {
    for (int row = 0; m->has_rows && row < (m->rows.gated ? 2 : 1); row++, record += m->row_bytes) {
      uint8_t* to = m->of_rows.data() + m->rows.offset_of(slot) + (row ? m->rows.up_offset() : 0);
      std::memcpy(to, record, m->row_bytes);
    }
    std::memcpy(m->of_columns.data() + size_t(slot) * m->column_bytes, record, column);
  };
  pool_ = std::make_unique<NeuronPool>(queue_, shape_, slots, place, file_);
  pool_->limit(base_);
  const std::string error = pool_->fill([&](size_t done, size_t total) { return progress && progress(done, total); });
  if (error == "cancelled") throw Error(ErrorCode::cancelled, error);
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
  const int64_t read = queue_->stats().bytes;
  const double seconds = std::chrono::duration<double>(Clock::now() - t0).count();
  if (read >= int64_t(16) << 20) load_rate_ = double(read) / seconds;
}

// Slots with so much that is lent.
int NeuronStore::limit_with(size_t lent) const {
  const size_t free = lent > kLendSpare ? lent - kLendSpare : 0, most = size_t(pool_->slots() - base_);
  return base_ + int(std::min(most, free / slot_bytes()) / kNeuronBlock * kNeuronBlock);
}

void NeuronStore::lend(size_t bytes) {
  if (pool_->slots() == base_) return;
  const int before = pool_->limit(), now = limit_with(bytes);
  if (now == before || (now > before && now - before < kFewSlots && enough())) return;
  pool_->limit(now);
  if (now > before) return;
  const int block = (now + kNeuronBlock - 1) / kNeuronBlock * kNeuronBlock;
  const size_t rows = memory_->has_rows ? memory_->rows.offset_of(block) : memory_->of_rows.size();
  const size_t columns = size_t(now) * column_bytes_;
  if (rows < memory_->of_rows.size()) discard_pages(memory_->of_rows.data() + rows, memory_->of_rows.size() - rows);
  discard_pages(memory_->of_columns.data() + columns, memory_->of_columns.size() - columns);
}

size_t NeuronStore::token_cost(double share) const {
  const double missing = std::max(0.0, share * double(all_neurons()) - pool_->slots() / 2.0);
  return size_t(missing * double(shape_.stride + shape_.gap)) + (gates_ ? gates_->streamed_bytes() : 0);
}

void NeuronStore::begin_token() {
  pool_->begin_token();
  if (gates_) gates_->begin_pass();
}

std::string NeuronStore::end_token() {
  std::string error = pool_->end_token(), of_gates = gates_ ? gates_->end_pass() : std::string();
  if (error.empty()) error = std::move(of_gates);
  return error.empty() ? change_of(*source_) : error;
}

void NeuronStore::rows(const NeuronRows& w, int layer, const InputBuffer& x, const int32_t* ids, int begin, int end,
                       float* gate, float* up, int32_t* slots) const {
  if (begin >= end) return;
  int32_t* at = slots - begin;  // as the results, by position
  for (int k = begin; k < end; k++) at[k] = pool_->slot(layer, ids ? ids[k] : k);
  const NeuronMatrix& m = memory_->rows;
  if (w.quantised()) kernels().rows_q(m, x.ordered(0), at, begin, end, gate, up);
  else kernels().rows_f(m, x.input(0).x, at, begin, end, gate, up);
  add_biases(w, ids, begin, end, gate, up);
}

void NeuronStore::places(int layer, const ActiveColumns& active, int begin, int end, uint32_t* place) const {
  for (int s = begin; s < end; s++) {
    for (int i = 0; i < active.count[s]; i++) {
      const size_t at = size_t(s) * kSlabCols + size_t(i);
      place[at] = uint32_t(size_t(pool_->slot(layer, s * kSlabCols + active.cols[at])) * column_bytes_);
    }
  }
}

}  // namespace sr
