// The file beside the weights that holds every FFN neuron in one piece, so that single ones can be read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "format/packed_model.h"

namespace sr {

// One layer. A record is a gate row (where gated), an up row and the codes of a column of down, panel after panel.
struct NeuronRecords {
  uint64_t offset = 0;     // of the file
  size_t stride = 0;       // from one record to the next
  const uint32_t* positions = nullptr;  // [neurons]: which record
  uint64_t heads_offset = 0;  // scales and minima of down, slab after slab, panel after panel
  size_t heads_bytes = 0;
};

class NeuronFile {
 public:
  static std::string path_in(const std::string& directory) { return directory + "/neurons.safetensors"; }

  // Throws Error(model) where the file is damaged. Reads its header and the positions.
  NeuronFile(std::shared_ptr<ByteSource> source, int layers, int neurons);

  // Error(model) unless the layer's records are those of these matrices: sizes, and some rows compared byte by byte
  // with the weights, which are read for it.
  void check(int layer, const PackedModel& model, const NeuronMatrix& rows, const PanelMatrix& down) const;
  const NeuronRecords& records(int layer) const { return records_[size_t(layer)]; }
  const uint32_t* positions() const { return positions_.data(); }  // [layers, neurons]

 private:
  std::shared_ptr<ByteSource> source_;
  Safetensors file_;
  int neurons_;
  std::vector<NeuronRecords> records_;
  AlignedBuffer<uint32_t> positions_;
};

// Bytes of a record without what fills it up, and of the scales of down.
size_t neuron_record_bytes(const NeuronMatrix& rows, const PanelMatrix& down);
size_t neuron_heads_bytes(const PanelMatrix& down);
inline size_t neuron_column_bytes(const PanelMatrix& down) { return down.run_bytes(down.padded_rows()); }

}  // namespace sr
