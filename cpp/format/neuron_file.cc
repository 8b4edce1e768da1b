// Positions must be a permutation and records must lie inside the file; a few rows are compared with the weights, so
// that a file left over from another conversion is found out.
#include "format/neuron_file.h"

#include <cstring>
#include <utility>

#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr size_t kRecordAlign = 64;

}  // namespace

size_t neuron_record_bytes(const NeuronMatrix& rows, const PanelMatrix& down) {
  return rows.record_bytes() + neuron_column_bytes(down);
}

size_t neuron_heads_bytes(const PanelMatrix& down) {
  return down.heads_bytes(down.padded_rows());
}

NeuronFile::NeuronFile(std::shared_ptr<ByteSource> source, int layers, int neurons)
    : source_(source), file_(std::move(source)), neurons_(neurons) {
  const auto tensor = [&](const std::string& name) -> const TensorView& {
    const TensorView* view = file_.find(name);
    if (!view) file_.damaged("tensor " + name + " is missing");
    if (view->dtype != "U8" || view->file_offset % kReadAlign) file_.damaged(name + " has an impossible type or place");
    return *view;
  };
  const auto version = file_.metadata().find("neurons_version");
  if (version == file_.metadata().end() || version->second != "1") {
    throw Error(ErrorCode::unsupported,
                file_.path() + ": not a file of neurons that this program reads; convert the model again");
  }
  positions_.reset(size_t(layers) * size_t(neurons), "the order of neurons");
  for (int l = 0; l < layers; l++) {
    const std::string at = "layers." + std::to_string(l) + ".";
    const TensorView &all = tensor(at + "ffn_records"), &order = tensor(at + "ffn_positions"),
                     &heads = tensor(at + "ffn_heads");
    NeuronRecords r;
    r.offset = all.file_offset;
    r.stride = all.bytes / size_t(neurons);
    if (all.bytes % size_t(neurons) || r.stride % kRecordAlign || !r.stride) {
      file_.damaged(at + "ffn_records are not " + std::to_string(neurons) + " records of the same size");
    }
    if (order.bytes != size_t(neurons) * sizeof(uint32_t)) file_.damaged(at + "ffn_positions has a wrong size");
    uint32_t* positions = positions_.data() + size_t(l) * size_t(neurons);
    file_.file().fetch(order.file_offset, order.bytes);
    std::memcpy(positions, order.data, order.bytes);
    std::vector<bool> seen(static_cast<size_t>(neurons));
    for (int i = 0; i < neurons; i++) {
      if (positions[i] >= uint32_t(neurons) || seen[positions[i]]) {
        file_.damaged(at + "ffn_positions is not a permutation of the neurons");
      }
      seen[positions[i]] = true;
    }
    r.positions = positions;
    r.heads_offset = heads.file_offset;
    r.heads_bytes = heads.bytes;
    records_.push_back(r);
  }
}

void NeuronFile::check(int layer, const PackedModel& model, const NeuronMatrix& rows, const PanelMatrix& down) const {
  const NeuronRecords& r = records_[size_t(layer)];
  const std::string at = "layer " + std::to_string(layer) + " ";
  const size_t bytes = neuron_record_bytes(rows, down);
  if (r.stride < bytes || r.heads_bytes != neuron_heads_bytes(down)) {
    file_.damaged(at + "does not have the sizes of the weights");
  }
  const MappedFile& weights = model.weights().file();
  AlignedBuffer<uint8_t> room(size_t(align_up(bytes)) + 3 * kReadAlign, "a neuron");
  uint8_t* to = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(room.data())));
  for (int neuron : {0, neurons_ / 2, neurons_ - 1}) {
    const uint64_t record = r.offset + r.positions[neuron] * r.stride, begin = align_down(record);
    const std::string error = read_fully(*source_, to, size_t(align_up(record + bytes) - begin), begin);
    if (!error.empty()) throw Error(ErrorCode::runtime, error);
    const size_t row = size_t(rows.data - weights.data()) + rows.offset_of(neuron) + rows.up_offset();
    weights.fetch(row, rows.row_stride());
    const uint8_t* up = to + (record - begin) + (rows.gated ? rows.row_stride() : 0);
    if (std::memcmp(up, weights.data() + row, rows.row_stride()) != 0) {
      file_.damaged(at + "holds other neurons than the weights beside it");
    }
  }
}

}  // namespace sr
