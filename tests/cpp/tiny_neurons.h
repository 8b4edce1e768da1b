// The file of single neurons (models/format.md) of a small model, made from its weights, in any order.
#pragma once

#include <numeric>

#include "format/neuron_file.h"
#include "tiny_model.h"

namespace sr_test {

// stride: 0 = the record's size in whole lines. Needs layout `neurons` and a quantised ffn_down in one part.
inline SafetensorsText neurons_of(TinyModel& tiny, const TinySpec& spec, uint32_t seed, size_t stride = 0) {
  std::mt19937 rng(seed);
  SafetensorsText out;
  out.metadata["neurons_version"] = "1";
  for (int l = 0; l < spec.n_layers; l++) {
    const std::string at = "layers." + std::to_string(l) + ".";
    const std::string in = at + (spec.gated ? "ffn_gate_up" : "ffn_up");
    const auto kind_of = [&](const std::string& name) {
      std::string kind = spec.kind;
      for (const auto& k : spec.kinds) {
        if (name.find(k.first) != std::string::npos) kind = k.second;
      }
      return sr::weight_kind_from_name(kind);
    };
    sr::NeuronMatrix rows;
    rows.kind = kind_of(in);
    rows.has_min = sr::is_quantised(rows.kind) && spec.has_min;
    rows.group = spec.group;
    rows.neurons = spec.n_ff;
    rows.cols = spec.n_embd;
    rows.gated = spec.gated;
    sr::PanelMatrix down;
    down.kind = kind_of(at + "ffn_down");
    down.has_min = spec.has_min;
    down.group = spec.group;
    down.unit_slabs = spec.units ? sr::kUnitSlabs : 0;
    down.rows = spec.n_embd;
    down.cols = spec.n_ff;
    down.panel_rows = 128;
    const std::string &of_rows = tiny.weights().tensors[in].data,
                      &of_down = tiny.weights().tensors[at + "ffn_down"].data;
    const size_t bytes = sr::neuron_record_bytes(rows, down), step = stride ? stride : (bytes + 63) / 64 * 64;
    std::vector<uint32_t> positions(static_cast<size_t>(spec.n_ff));
    std::iota(positions.begin(), positions.end(), 0u);
    if (seed) std::shuffle(positions.begin(), positions.end(), rng);
    std::string records(step * positions.size(), '\0'), heads;
    for (int i = 0; i < spec.n_ff; i++) {
      std::string record = of_rows.substr(rows.offset_of(i), rows.row_stride());
      if (rows.gated) record += of_rows.substr(rows.offset_of(i) + rows.up_offset(), rows.row_stride());
      size_t panel = 0;
      for (int r = 0; r < down.padded_rows(); r += down.panel_rows) {
        const int R = std::min(down.panel_rows, down.padded_rows() - r);
        const size_t slabs = panel + down.units_bytes(R),
                     slab = slabs + size_t(i / sr::kSlabCols) * down.slab_bytes(R) + down.slab_head_bytes(R);
        record += of_down.substr(slab + size_t(i % sr::kSlabCols) * down.run_bytes(R), down.run_bytes(R));
        panel += down.panel_bytes(R);
      }
      records.replace(positions[size_t(i)] * step, record.size(), record);
    }
    size_t panel = 0;
    for (int r = 0; r < down.padded_rows(); r += down.panel_rows) {
      const int R = std::min(down.panel_rows, down.padded_rows() - r);
      const size_t units = down.units_bytes(R);
      heads += of_down.substr(panel, units);
      for (int s = 0; s < down.slabs(); s++) {
        heads += of_down.substr(panel + units + size_t(s) * down.slab_bytes(R), down.slab_head_bytes(R));
      }
      panel += down.panel_bytes(R);
    }
    const std::string order(reinterpret_cast<const char*>(positions.data()), positions.size() * sizeof(uint32_t));
    for (const auto& t : {std::make_pair("ffn_records", records), std::make_pair("ffn_positions", order),
                          std::make_pair("ffn_heads", heads)}) {
      out.tensors[at + t.first] = {"U8", {int64_t(t.second.size())}, t.second};
    }
  }
  return out;
}

}  // namespace sr_test
