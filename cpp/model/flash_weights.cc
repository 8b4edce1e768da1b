// Matrices are cut between panels: a tile is computed from the same bytes by the same kernel wherever it lies, so that
// the results are those of a model in memory, bit for bit.
#include "model/flash_weights.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include "flash/read_group.h"
#include "format/packed_model.h"
#include "kernels/pack/pack.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr double kRateSeconds = 0.3;

struct Bytes {
  size_t begin, end;  // of the file
};

// What cannot be parted: a panel, or two of a single tile each where a tile of gate goes with one of up.
struct Grain {
  int rows;   // of each but perhaps the last
  int count;
};

Grain grain_of(const PanelMatrix& m, int tiles_per_unit) {
  const int rows = m.panel_rows / kTileRows % tiles_per_unit ? m.panel_rows * tiles_per_unit : m.panel_rows;
  return {rows, (m.padded_rows() + rows - 1) / rows};
}

// Rows [begin, end) of m, whole panels, as a matrix of their own.
PanelMatrix some_rows(const PanelMatrix& m, int begin, int end) {
  PanelMatrix out = m;
  out.data = m.data + size_t(begin / m.panel_rows) * m.panel_bytes(m.panel_rows);
  out.rows = std::min(m.rows, end) - begin;
  return out;
}

PanelMatrix some_grains(const PanelMatrix& m, const Grain& g, int begin, int end) {
  return some_rows(m, begin * g.rows, end * g.rows);
}

size_t grain_size(const PanelMatrix& m, const Grain& g, int i) { return some_grains(m, g, i, i + 1).total_bytes(); }

struct Matrix {
  Linear* w;
  WeightRank rank;
  int layer;
  int tiles_per_unit;
  NeuronRows* rows = nullptr;  // instead of w
};

// Neurons are parted by 64, as threads share them.
constexpr int kNeuronGrain = kTileRows;
static_assert(kNeuronGrain % kNeuronBlock == 0, "a block of neurons is one run of bytes");

size_t neuron_grain_bytes(const NeuronRows& w) { return size_t(kNeuronGrain) * w.m.record_bytes(); }

// All matrices in the order of use. An embedding that is not the head comes last: it is not streamed.
std::vector<Matrix> matrices(DecoderWeights* w) {
  std::vector<Matrix> all;
  for (size_t l = 0; l < w->layers.size(); l++) {
    LayerWeights& layer = w->layers[l];
    all.push_back({&layer.attn_qkv, WeightRank::attention, int(l), 1});
    all.push_back({&layer.attn_o, WeightRank::attention, int(l), 1});
    if (layer.ffn_rows) all.push_back({nullptr, WeightRank::ffn, int(l), 1, &layer.ffn_rows});
    else all.push_back({&layer.ffn_in, WeightRank::ffn, int(l), layer.ffn_in.rows == layer.ffn_down.cols ? 1 : 2});
    all.push_back({&layer.ffn_down, WeightRank::ffn, int(l), 1});
  }
  all.push_back({w->output.empty() ? &w->token_embd : &w->output, WeightRank::head, 0, 1});
  if (!w->output.empty()) all.push_back({&w->token_embd, WeightRank::embedding, 0, 1});
  return all;
}

// Where the stream's address of a unit is to be put.
struct Streamed {
  const uint8_t** data;
  int unit;
  size_t before;  // bytes of the matrix before the unit, where kernels count from its beginning
};

// Neurons of w after the first `resident` grains, in units of at most unit_bytes.
void cut_rows(NeuronRows* w, int resident, int threads, size_t unit_bytes, const uint8_t* file,
              std::vector<Bytes>* stays, std::vector<StreamUnit>* units, std::vector<Streamed>* streamed) {
  const int grains = w->m.neurons / kNeuronGrain;
  const size_t bytes = neuron_grain_bytes(*w), at = size_t(w->m.data - file);
  if (resident > 0) stays->push_back({at, at + size_t(resident) * bytes});
  if (resident == grains) return;
  w->slices.clear();
  if (resident > 0) w->slices.push_back({0, resident, -1, even_share(0, resident, threads, 1)});
  const int together = std::max(1, int((unit_bytes - std::min(unit_bytes, 2 * kReadAlign)) / bytes));
  for (int begin = resident; begin < grains; begin += together) {
    const int end = std::min(begin + together, grains);
    w->slices.push_back({begin, end, int(units->size()), even_share(begin, end, threads, 1)});
    units->push_back({uint64_t(at + size_t(begin) * bytes), size_t(end - begin) * bytes});
  }
  w->places.assign(w->slices.size(), w->m);
  for (size_t i = 0; i < w->slices.size(); i++) {
    const Slice& s = w->slices[i];
    if (s.unit >= 0) streamed->push_back({&w->places[i].data, s.unit, size_t(s.tile_begin) * bytes});
  }
}

// Cuts w after its first `resident` grains; what follows is grouped into units of at most unit_bytes.
void cut(const Matrix& m, int resident, int threads, size_t unit_bytes, const uint8_t* file,
         std::vector<Bytes>* stays, std::vector<StreamUnit>* units, std::vector<Streamed>* streamed) {
  const Linear whole = *m.w;
  Linear front = whole;  // the resident parts, for their shares
  front.parts.clear();
  std::vector<PanelMatrix> parts;
  std::vector<int> unit_of;
  for (const PanelMatrix& p : whole.parts) {
    const Grain g = grain_of(p, m.tiles_per_unit);
    const int kept = std::min(resident, g.count);
    resident -= kept;
    if (kept > 0) {
      parts.push_back(some_grains(p, g, 0, kept));
      unit_of.push_back(-1);
      const size_t at = size_t(parts.back().data - file);
      stays->push_back({at, at + parts.back().total_bytes()});
      front.parts.push_back(parts.back());
    }
    for (int begin = kept; begin < g.count;) {
      int end = begin + 1;
      size_t bytes = grain_size(p, g, begin);
      while (end < g.count && bytes + grain_size(p, g, end) <= unit_bytes - std::min(unit_bytes, 2 * kReadAlign)) {
        bytes += grain_size(p, g, end++);
      }
      parts.push_back(some_grains(p, g, begin, end));
      unit_of.push_back(int(units->size()));
      units->push_back({uint64_t(parts.back().data - file), parts.back().total_bytes()});
      begin = end;
    }
  }
  if (unit_of.back() < 0) return;  // all of it stays
  Linear& w = *m.w;
  w.parts = parts;
  number_parts(&w);
  w.slices.clear();
  for (size_t i = 0; i < parts.size(); i++) {
    if (unit_of[i] < 0) continue;
    const int begin = w.tile_begin[i], end = w.tile_begin[i + 1];
    if (w.slices.empty() && begin > 0) {
      front.tile_begin.assign(w.tile_begin.begin(), w.tile_begin.begin() + std::ptrdiff_t(i) + 1);
      set_shares(&front, threads, m.tiles_per_unit);
      w.slices.push_back({0, begin, -1, front.share});
    }
    w.slices.push_back({begin, end, unit_of[i], even_share(begin, end, threads, m.tiles_per_unit)});
    streamed->push_back({&w.parts[i].data, unit_of[i], 0});
  }
}

// Whole blocks that hold all of it, in ascending order, as ranges of type Range.
template <class Range>
std::vector<Range> merged(std::vector<Bytes> pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const Bytes& a, const Bytes& b) { return a.begin < b.begin; });
  std::vector<Range> out;
  for (const Bytes& p : pieces) {
    const Range r = {size_t(align_down(p.begin)), size_t(align_up(p.end))};
    if (!out.empty() && r.begin <= out.back().end) out.back().end = std::max(out.back().end, r.end);
    else out.push_back(r);
  }
  return out;
}

// What of `from` is not in `without`; both ascending.
template <class Range>
std::vector<Range> difference(const std::vector<Range>& from, const std::vector<Range>& without) {
  std::vector<Range> out;
  size_t k = 0;
  for (Range r : from) {
    while (k < without.size() && without[k].end <= r.begin) k++;
    for (size_t i = k; i < without.size() && without[i].begin < r.end; i++) {
      if (without[i].begin > r.begin) out.push_back({r.begin, without[i].begin});
      r.begin = std::min(r.end, without[i].end);
    }
    if (r.begin < r.end) out.push_back(r);
  }
  return out;
}

// Asks for huge pages, or against them, where [begin, end) holds whole ones: a part of one would take memory for what
// is not resident.
void advise_huge_pages(uint8_t* begin, uint8_t* end, bool wanted) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(begin), b = reinterpret_cast<uintptr_t>(end);
  const uintptr_t first = wanted ? (a + kHugePage - 1) / kHugePage * kHugePage : a;
  const uintptr_t last = wanted ? b / kHugePage * kHugePage : b;
  if (last <= first) return;
  if (wanted) prefer_huge_pages(reinterpret_cast<void*>(first), last - first);
  else refuse_huge_pages(reinterpret_cast<void*>(first), last - first);
}

}  // namespace

ResidencyPlan FlashWeights::plan(const DecoderWeights& weights, size_t room) {
  std::vector<ResidencyItem> items;
  for (const Matrix& m : matrices(const_cast<DecoderWeights*>(&weights))) {
    ResidencyItem item;
    item.rank = m.rank;
    item.layer = m.layer;
    if (m.rows) item.panels.assign(size_t(m.rows->m.neurons / kNeuronGrain), neuron_grain_bytes(*m.rows));
    for (const PanelMatrix& p : m.w ? m.w->parts : std::vector<PanelMatrix>()) {
      const Grain g = grain_of(p, m.tiles_per_unit);
      for (int i = 0; i < g.count; i++) item.panels.push_back(grain_size(p, g, i));
    }
    items.push_back(std::move(item));
  }
  return plan_residency(items, room);
}

size_t FlashWeights::room_without_ffn(const DecoderWeights& w) {
  constexpr size_t kStep = size_t(1) << 20;
  size_t ffn = 0, rest = w.head().bytes;
  for (const LayerWeights& l : w.layers) {
    ffn += l.ffn_bytes();
    rest += l.attn_qkv.bytes + l.attn_o.bytes;
  }
  while (plan(w, rest).streamed_bytes > ffn) rest += kStep;
  return rest;
}

FlashWeights::FlashWeights(const PackedModel& model, DecoderWeights* w, const ResidencyPlan& plan, int threads,
                           std::shared_ptr<ReadQueue> queue, const LoadProgress& progress)
    : room_(model.weights().file()),
      weights_(w),
      threads_(threads),
      queue_(std::move(queue)),
      embedding_(w->token_embd),
      file_(room_.data()) {
  SR_CHECK(room_.room(0));
  for (const Matrix& m : matrices(w)) {
    if (m.rows) whole_rows_.push_back(*m.rows);
    else whole_.push_back(*m.w);
  }
  const Clock::time_point t0 = Clock::now();
  const std::string error = arrange(plan, [&](size_t done, size_t total) { return progress && progress(done, total); });
  if (error == "cancelled") throw Error(ErrorCode::cancelled, error);
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
  const double seconds = std::chrono::duration<double>(Clock::now() - t0).count();
  size_t total = 0;
  for (const Range& r : held_) total += r.end - r.begin;
  if (progress) progress(total, total);
  if (total >= (size_t(16) << 20)) load_rate_ = double(total) / seconds;
  else if (stream_) measure_rate(progress);
}

std::string FlashWeights::resize(const ResidencyPlan& plan, const std::function<bool()>& should_stop) {
  if (stream_ && !stream_->settle(should_stop)) return "cancelled";
  end_stream();
  return arrange(plan, [&](size_t, size_t) { return should_stop(); });
}

bool FlashWeights::park(const std::function<bool()>& should_stop) {
  if (!usable_ || !stream_) return true;
  if (!stream_->settle(should_stop)) return false;
  end_stream();
  std::lock_guard<std::mutex> lock(mutex_);
  sizes_.ring = 0;
  usable_ = false;
  parked_ = true;
  return true;
}

bool FlashWeights::holds_all_but_ffn() const {
  const auto held = [](const Linear& w) { return w.slices.empty(); };
  return held(weights_->head()) &&
         std::all_of(weights_->layers.begin(), weights_->layers.end(),
                     [&](const LayerWeights& l) { return held(l.attn_qkv) && held(l.attn_o); });
}

void FlashWeights::end_stream() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!stream_) return;
  past_ += stream_->stats();
  stream_ = nullptr;
}

// There is no stream, and no pass is running.
std::string FlashWeights::arrange(const ResidencyPlan& plan, const Waiting& waiting) {
  usable_ = parked_ = false;
  std::vector<Bytes> stays;
  std::vector<StreamUnit> units;
  std::vector<Streamed> streamed;
  const std::vector<Matrix> all = matrices(weights_);
  size_t panel = 0, linear = 0, by_neuron = 0;
  resident_rows_ = 0;
  for (const Matrix& m : all) {
    if (m.rows) *m.rows = whole_rows_[by_neuron++];
    else *m.w = whole_[linear++];
  }
  for (size_t i = 0; i < all.size(); i++) {
    const int kept = plan.resident[i];
    if (all[i].rows) {
      cut_rows(all[i].rows, kept, threads_, plan.unit_bytes, file_, &stays, &units, &streamed);
      continue;
    }
    if (all[i].w == &weights_->token_embd) {
      int left = kept;
      for (const PanelMatrix& p : embedding_.parts) {
        const Grain g = grain_of(p, 1);
        const int here = std::min(left, g.count);
        left -= here;
        resident_rows_ += std::min(p.rows, here * g.rows);
        for (int k = here; k < g.count; k++) panel = std::max(panel, grain_size(p, g, k));
      }
    }
    if (all[i].rank == WeightRank::embedding) {
      // Nothing of it is streamed: cut only to learn what stays.
      Linear copy = weights_->token_embd;
      std::vector<StreamUnit> ignored;
      std::vector<Streamed> nothing;
      cut({&copy, all[i].rank, 0, 1}, kept, threads_, plan.unit_bytes, file_, &stays, &ignored, &nothing);
      continue;
    }
    cut(all[i], kept, threads_, plan.unit_bytes, file_, &stays, &units, &streamed);
  }
  panel = panel ? size_t(align_up(panel)) + 3 * kReadAlign : 0;
  if (panel && (!panel_ || panel_->size() < panel)) {
    panel_ = std::make_shared<AlignedBuffer<uint8_t>>(panel, "an embedding row");
  }

  // Matrices begin at multiples of a block: no block holds anything but one matrix.
  const std::vector<Range> wanted = merged<Range>(std::move(stays));
  const std::vector<Range> leave = difference(held_, wanted), missing = difference(wanted, held_);
  held_ = difference(held_, leave);
  for (const Range& r : leave) {
    advise_huge_pages(room_.room(r.begin), room_.room(r.end), false);
    discard_pages(room_.room(r.begin), r.end - r.begin);
  }
  for (const Range& r : wanted) advise_huge_pages(room_.room(r.begin), room_.room(r.end), true);
  ReadGroup reads(queue_.get());
  size_t total = 0;
  for (const Range& r : missing) {
    total += r.end - r.begin;
    reads.submit(r.begin, r.end - r.begin, room_.room(r.begin), nullptr);
  }
  const int64_t before = queue_->stats().bytes;
  // What a stopped or failed read has brought is not counted as held: it is read again.
  const std::string error = reads.wait([&] { return waiting(size_t(queue_->stats().bytes - before), total); });
  if (!error.empty()) return error;
  held_ = wanted;

  std::unique_ptr<WeightStream> stream;
  if (!units.empty()) {
    stream = std::make_unique<WeightStream>(queue_, units, plan.ring_bytes, threads_);
    for (const Streamed& s : streamed) {
      *s.data = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(stream->address(s.unit)) - s.before);
    }
  }
  units_ = int(units.size());
  plan_ = plan;
  std::lock_guard<std::mutex> lock(mutex_);
  stream_ = std::move(stream);
  sizes_ = {plan.resident_bytes, plan.streamed_bytes, stream_ ? stream_->ring_bytes() : 0};
  usable_ = true;
  return "";
}

FlashWeights::Sizes FlashWeights::sizes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return sizes_;
}

StreamStats FlashWeights::stream_stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  StreamStats s = past_;
  if (stream_) s += stream_->stats();
  return s;
}

// The disk's rate where too little was read to tell: some of the units, as a pass reads them.
void FlashWeights::measure_rate(const LoadProgress& progress) {
  const std::function<bool()> stop = [&] { return progress && progress(0, 0); };
  const Clock::time_point t0 = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - t0).count(); };
  stream_->begin_pass();
  for (int u = 0; u < units_ && seconds() < kRateSeconds; u++) {
    stream_->await(u, &stop);
    for (int t = 0; t < threads_; t++) stream_->done(u);
  }
  const size_t bytes = size_t(stream_->stats().bytes);
  const std::string error = stream_->end_pass();
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
  load_rate_ = double(bytes) / seconds();
}

void FlashWeights::begin_pass() {
  if (stream_) stream_->begin_pass();
}

std::string FlashWeights::end_pass() {
  std::string error = stream_ ? stream_->end_pass() : std::string();
  if (error.empty() && (stream_ || panel_)) {
    error = change_of(queue_->source());
  }
  return error;
}

std::string FlashWeights::read(uint64_t offset, size_t bytes, uint8_t* to, const std::function<bool()>& should_stop) {
  ReadGroup reads(queue_.get());
  reads.submit(offset, bytes, to, panel_);
  const std::string error = reads.wait(should_stop);
  // The reader may still write there: the next rows get memory of their own.
  if (error == "cancelled") panel_ = std::make_shared<AlignedBuffer<uint8_t>>(panel_->size(), "an embedding row");
  return error;
}

std::string FlashWeights::fetch_rows(const int32_t* tokens, int n, const std::function<bool()>& should_stop,
                                     float* out) {
  // Panel by panel: rows of the same panel are read once.
  std::vector<int> order(static_cast<size_t>(n));
  for (int i = 0; i < n; i++) order[size_t(i)] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
  const PanelMatrix* held = nullptr;
  int held_panel = -1;
  PanelMatrix one;
  for (int i : order) {
    float* row_out = out + size_t(i) * size_t(embedding_.cols);
    size_t p = 0;
    while (tokens[i] >= embedding_.row_begin[p + 1]) p++;
    const PanelMatrix& part = embedding_.parts[p];
    const int row = tokens[i] - embedding_.row_begin[p], panel = row / part.panel_rows;
    if (tokens[i] < resident_rows_) {
      unpack_row(part, row, row_out);
      continue;
    }
    if (held != &part || held_panel != panel) {
      one = some_rows(part, panel * part.panel_rows, (panel + 1) * part.panel_rows);
      const uint64_t offset = uint64_t(one.data - file_), begin = align_down(offset);
      uint8_t* to = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(panel_->data())));
      const size_t bytes = size_t(align_up(offset + one.total_bytes()) - begin);
      const std::string error = read(begin, bytes, to, should_stop);
      if (!error.empty()) return error;
      one.data = to + (offset - begin);
      held = &part;
      held_panel = panel;
    }
    unpack_row(one, row - panel * part.panel_rows, row_out);
  }
  return "";
}

}  // namespace sr
