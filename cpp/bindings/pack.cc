// Packing and unpacking of panels and of neuron records, for the converter and the tests.
#include <algorithm>

#include "bindings/bindings.h"
#include "kernels/pack/pack.h"
#include "kernels/pack/quantise.h"
#include "kernels/pack/rows.h"
#include "model/linear.h"

namespace sr {

void check_group(py::ssize_t group) {
  if (group != 32 && group != 16) {
    throw Error(ErrorCode::usage, "group must be 32 or 16, got " + std::to_string(group));
  }
}

int unit_slabs_of(py::ssize_t superblock) {
  constexpr int kColumns = kUnitSlabs * kSlabCols;
  if (superblock != 0 && superblock != kColumns) {
    throw Error(ErrorCode::usage, "superblock must be 0 or " + std::to_string(kColumns) + ", got " +
                                      std::to_string(superblock));
  }
  return int(superblock) / kSlabCols;
}

namespace {

constexpr py::ssize_t kMaxSide = py::ssize_t(1) << 24;

void check_sides(WeightKind kind, py::ssize_t rows, py::ssize_t cols, int group) {
  if (rows < 1 || rows > kMaxSide || cols < 1 || cols > kMaxSide) {
    throw Error(ErrorCode::usage, "rows and cols must be from 1 to " + std::to_string(kMaxSide));
  }
  if (is_quantised(kind)) check_group(group);
  if (!is_quantised(kind) && rows > kTileRows) throw Error(ErrorCode::usage, "a float panel has at most 64 rows");
}

size_t panel_bytes_py(const std::string& kind, py::ssize_t rows, py::ssize_t cols, int group, bool has_min,
                      int superblock) {
  const WeightKind k = weight_kind_from_name(kind);
  check_sides(k, rows, cols, group);
  return panel_bytes(k, int(rows), int(cols), group, has_min, unit_slabs_of(superblock));
}

// Codes of rows as Python has them: uint8 [rows, cols], with scales and, unless that is None, minima, float16
// [rows, ceil(cols / group)]; or these as int8 and, for each, units in float16 [rows, ceil(cols / 256)].
struct RoundedRows {
  RoundedRows(const py::array& codes_in, const py::array& scales_in, const py::object& mins_in, bool products = false)
      : codes_(checked_array(codes_in, 'u', 1, 2, "codes")),
        scales_(checked_array(scales_in, products ? 'i' : 'f', products ? 1 : 2, 2, "scales")) {
    if (!mins_in.is_none()) {
      mins_ = checked_array(py::array::ensure(mins_in), products ? 'i' : 'f', products ? 1 : 2, 2, "mins");
    }
    rows = codes_.shape(0);
    cols = codes_.shape(1);
    codes = static_cast<const uint8_t*>(codes_.data());
    scales = static_cast<const uint16_t*>(scales_.data());
    if (!mins_in.is_none()) mins = static_cast<const uint16_t*>(mins_.data());
  }
  // Of products; the units must live as long as what is returned.
  UnitScales in_units(const py::array& units, const py::object& min_units, py::array* min_units_out) const {
    const py::ssize_t blocks = (cols + kUnitSlabs * kSlabCols - 1) / (kUnitSlabs * kSlabCols);
    if (has_min() == min_units.is_none()) throw Error(ErrorCode::usage, "min_units must come with mins");
    UnitScales out{static_cast<const int8_t*>(scales_.data()), nullptr, static_cast<const uint16_t*>(units.data()),
                   nullptr};
    if (has_min()) {
      *min_units_out = checked_array(py::array::ensure(min_units), 'f', 2, 2, "min_units");
      out.mins = static_cast<const int8_t*>(mins_.data());
      out.min_units = static_cast<const uint16_t*>(min_units_out->data());
    }
    for (const py::array* a : {&units, has_min() ? static_cast<const py::array*>(min_units_out) : &units}) {
      if (a->shape(0) != rows || a->shape(1) != blocks) {
        throw Error(ErrorCode::usage, "units and min_units must have the shape [rows, ceil(cols / 256)]");
      }
    }
    return out;
  }
  bool has_min() const { return mins != nullptr; }
  // For a group that is valid.
  void check_groups(int group) const {
    for (const py::array* a : {&scales_, has_min() ? &mins_ : &scales_}) {
      if (a->shape(0) != rows || a->shape(1) != (cols + group - 1) / group) {
        throw Error(ErrorCode::usage, "scales and mins must have the shape [rows, ceil(cols / group)]");
      }
    }
  }
  // Touches no Python object.
  void check_codes(const std::string& kind) const {
    uint8_t top = 0;
    for (py::ssize_t i = 0; i < rows * cols; i++) top = std::max(top, codes[i]);
    if (int(top) >> code_bits(weight_kind_from_name(kind))) {
      throw Error(ErrorCode::usage, "code " + std::to_string(top) + " does not fit into " + kind);
    }
  }

  py::ssize_t rows, cols;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* mins = nullptr;

 private:
  py::array codes_, scales_, mins_;
};

py::array pack_panel_py(const std::string& kind, const py::array& codes_in, const py::array& scales_in,
                        const py::object& mins_in, int group, const py::object& units_in,
                        const py::object& min_units_in) {
  const WeightKind k = weight_kind_from_name(kind);
  if (!is_quantised(k)) throw Error(ErrorCode::usage, kind + " is not a quantised kind: use pack_panel_float");
  const bool products = !units_in.is_none();
  const RoundedRows in(codes_in, scales_in, mins_in, products);
  check_sides(k, in.rows, in.cols, group);
  in.check_groups(group);
  const int rows = int(in.rows), cols = int(in.cols);
  py::array units, min_units;
  UnitScales scales{};
  if (products) {
    units = checked_array(py::array::ensure(units_in), 'f', 2, 2, "units");
    scales = in.in_units(units, min_units_in, &min_units);
  }
  py::array_t<uint8_t> out(py::ssize_t(panel_bytes(k, rows, cols, group, in.has_min(), products ? kUnitSlabs : 0)));
  uint8_t* o = out.mutable_data();
  py::gil_scoped_release release;
  in.check_codes(kind);
  if (products) pack_panel(k, in.codes, scales, rows, cols, group, o);
  else pack_panel(k, in.codes, in.scales, in.mins, rows, cols, group, o);
  return out;
}

py::array pack_panel_float_py(const std::string& kind, const py::array& values_in) {
  const WeightKind k = weight_kind_from_name(kind);
  if (is_quantised(k)) throw Error(ErrorCode::usage, kind + " is a quantised kind: use pack_panel");
  const py::array values = checked_array(values_in, 'f', 4, 2, "values");
  const py::ssize_t rows = values.shape(0), cols = values.shape(1);
  check_sides(k, rows, cols, 32);
  py::array_t<uint8_t> out(py::ssize_t(panel_bytes(k, int(rows), int(cols), 32, false)));
  const auto* v = static_cast<const float*>(values.data());
  uint8_t* o = out.mutable_data();
  py::gil_scoped_release release;
  pack_panel_float(k, v, int(rows), int(cols), o);
  return out;
}

py::array unpack_panel_py(const std::string& kind, const py::array& data_in, py::ssize_t rows, py::ssize_t cols,
                          int group, bool has_min, int superblock) {
  const WeightKind k = weight_kind_from_name(kind);
  check_sides(k, rows, cols, group);
  const int unit_slabs = unit_slabs_of(superblock);
  const py::array data = checked_array(data_in, 'u', 1, 1, "data");
  const size_t bytes = panel_bytes(k, int(rows), int(cols), group, has_min, unit_slabs);
  if (size_t(data.size()) != bytes) {
    throw Error(ErrorCode::usage, "the panel must have " + std::to_string(bytes) + " bytes, got " +
                                      std::to_string(data.size()));
  }
  py::array_t<float> out({rows, cols});
  const auto* d = static_cast<const uint8_t*>(data.data());
  float* o = out.mutable_data();
  py::gil_scoped_release release;
  unpack_panel(k, d, int(rows), int(cols), group, has_min, o, unit_slabs);
  return out;
}

// What `neurons` records are, checked.
NeuronMatrix neuron_shape(const std::string& kind, py::ssize_t neurons, py::ssize_t cols, int group, bool has_min,
                          bool gated) {
  NeuronMatrix m;
  m.kind = weight_kind_from_name(kind);
  if (neurons < 1 || neurons > kMaxSide || cols < 1 || cols > kMaxSide) {
    throw Error(ErrorCode::usage, "neurons and cols must be from 1 to " + std::to_string(kMaxSide));
  }
  if (is_quantised(m.kind)) check_group(group);
  m.neurons = int(neurons);
  m.cols = int(cols);
  m.group = group;
  m.has_min = has_min;
  m.gated = gated;
  return m;
}

// Neurons that `rows` plain rows make.
py::ssize_t neurons_of(py::ssize_t rows, bool gated) {
  if (gated && rows % 2) throw Error(ErrorCode::usage, "gated neurons have two rows each, got " + std::to_string(rows));
  return gated ? rows / 2 : rows;
}

size_t neuron_bytes_py(const std::string& kind, py::ssize_t neurons, py::ssize_t cols, int group, bool has_min,
                       bool gated) {
  return neuron_shape(kind, neurons, cols, group, has_min, gated).total_bytes();
}

py::array pack_neurons_py(const std::string& kind, const py::array& codes_in, const py::array& scales_in,
                          const py::object& mins_in, int group, bool gated) {
  const RoundedRows in(codes_in, scales_in, mins_in);
  const NeuronMatrix m = neuron_shape(kind, neurons_of(in.rows, gated), in.cols, group, in.has_min(), gated);
  if (!is_quantised(m.kind)) throw Error(ErrorCode::usage, kind + " is not a quantised kind: use pack_neurons_float");
  in.check_groups(group);
  py::array_t<uint8_t> out{py::ssize_t(m.total_bytes())};
  uint8_t* o = out.mutable_data();
  py::gil_scoped_release release;
  in.check_codes(kind);
  pack_neurons(m, in.codes, in.scales, in.mins, o);
  return out;
}

py::array pack_neurons_float_py(const std::string& kind, const py::array& values_in, bool gated) {
  const py::array values = checked_array(values_in, 'f', 4, 2, "values");
  const NeuronMatrix m =
      neuron_shape(kind, neurons_of(values.shape(0), gated), values.shape(1), 32, false, gated);
  if (is_quantised(m.kind)) throw Error(ErrorCode::usage, kind + " is a quantised kind: use pack_neurons");
  py::array_t<uint8_t> out{py::ssize_t(m.total_bytes())};
  const auto* v = static_cast<const float*>(values.data());
  uint8_t* o = out.mutable_data();
  py::gil_scoped_release release;
  pack_neurons_float(m, v, o);
  return out;
}

py::array unpack_neurons_py(const std::string& kind, const py::array& data_in, py::ssize_t neurons, py::ssize_t cols,
                            int group, bool has_min, bool gated) {
  const py::array data = checked_array(data_in, 'u', 1, 1, "data");
  NeuronMatrix m = neuron_shape(kind, neurons, cols, group, has_min, gated);
  if (size_t(data.size()) != m.total_bytes()) {
    throw Error(ErrorCode::usage, "the records must have " + std::to_string(m.total_bytes()) + " bytes, got " +
                                      std::to_string(data.size()));
  }
  py::array_t<float> out({neurons * (gated ? 2 : 1), cols});
  m.data = static_cast<const uint8_t*>(data.data());
  float* o = out.mutable_data();
  py::gil_scoped_release release;
  unpack_neurons(m, o);
  return out;
}

py::tuple quantise_rows_py(const py::array& values_in, const std::string& kind, int group, bool has_min,
                           const py::object& importance_in) {
  const WeightKind k = weight_kind_from_name(kind);
  if (!is_quantised(k)) throw Error(ErrorCode::usage, kind + " is not a quantised kind");
  if (group < 16 || group > 128 || group % 16)
    throw Error(ErrorCode::usage, "group must be a multiple of 16 up to 128");
  const py::array values = checked_array(values_in, 'f', 4, 2, "values");
  const py::ssize_t rows = values.shape(0), cols = values.shape(1), groups = (cols + group - 1) / group;
  if (rows < 1 || rows > kMaxSide || cols < 1 || cols > kMaxSide) {
    throw Error(ErrorCode::usage, "rows and cols must be from 1 to " + std::to_string(kMaxSide));
  }
  py::array importance;
  const float* weights = nullptr;
  if (!importance_in.is_none()) {
    importance = checked_array(py::array::ensure(importance_in), 'f', 4, 1, "importance");
    if (importance.shape(0) != cols) throw Error(ErrorCode::usage, "importance must have one value a column");
    weights = static_cast<const float*>(importance.data());
  }
  const py::dtype half = py::dtype("float16");
  py::array_t<uint8_t> codes({rows, cols});
  py::array scales(half, {rows, groups}), mins(half, {has_min ? rows : 0, groups});
  const auto* x = static_cast<const float*>(values.data());
  uint8_t* c = codes.mutable_data();
  auto* s = static_cast<uint16_t*>(scales.mutable_data());
  auto* m = has_min ? static_cast<uint16_t*>(mins.mutable_data()) : nullptr;
  QuantiseError total;
  {
    py::gil_scoped_release release;
    for (py::ssize_t r = 0; r < rows; ++r) {
      const QuantiseError one = quantise_row(x + r * cols, weights, int(cols), code_bits(k), group, c + r * cols,
                                             s + r * groups, m ? m + r * groups : nullptr);
      total.error += one.error;
      total.weight += one.weight;
    }
  }
  py::object minima = py::none();
  if (has_min) minima = mins;
  return py::make_tuple(codes, scales, minima, total.error, total.weight);
}

}  // namespace

void bind_pack(py::module_& m) {
  m.def("column_stretches", &stretches_that_pay, py::arg("rows"), py::arg("cols"),
        "Stretches of columns that threads share; see _core.pyi.");
  m.def("panel_bytes", &panel_bytes_py, py::arg("kind"), py::arg("rows"), py::arg("cols"), py::arg("group"),
        py::arg("has_min"), py::arg("superblock") = 0, "Bytes of one panel of `rows` rows (models/format.md).");
  m.def("pack_panel", &pack_panel_py, py::arg("kind"), py::arg("codes"), py::arg("scales"), py::arg("mins").none(true),
        py::arg("group"), py::arg("units") = py::none(), py::arg("min_units") = py::none(),
        "One quantised panel: codes [rows, cols], scales and mins [rows, ceil(cols / group)].");
  m.def("pack_panel_float", &pack_panel_float_py, py::arg("kind"), py::arg("values"),
        "One float panel (up to 64 rows), values [rows, cols].");
  m.def("quantise_rows", &quantise_rows_py, py::arg("values"), py::arg("kind"), py::arg("group"), py::arg("has_min"),
        py::arg("importance").none(true) = py::none(),
        "Weights [rows, cols] to codes, scales and minima; see _core.pyi.");
  m.def("unpack_panel", &unpack_panel_py, py::arg("kind"), py::arg("data"), py::arg("rows"), py::arg("cols"),
        py::arg("group"), py::arg("has_min"), py::arg("superblock") = 0, "The weights of one panel, [rows, cols].");
  m.def("neuron_bytes", &neuron_bytes_py, py::arg("kind"), py::arg("neurons"), py::arg("cols"), py::arg("group"),
        py::arg("has_min"), py::arg("gated"), "Bytes of the records of `neurons` neurons (models/format.md).");
  m.def("pack_neurons", &pack_neurons_py, py::arg("kind"), py::arg("codes"), py::arg("scales"),
        py::arg("mins").none(true), py::arg("group"), py::arg("gated"),
        "Quantised records: rows gate 0, up 0, gate 1, up 1 ... where gated, else up 0, up 1 ...");
  m.def("pack_neurons_float", &pack_neurons_float_py, py::arg("kind"), py::arg("values"), py::arg("gated"),
        "Float records, values [rows, cols] in the same order.");
  m.def("unpack_neurons", &unpack_neurons_py, py::arg("kind"), py::arg("data"), py::arg("neurons"), py::arg("cols"),
        py::arg("group"), py::arg("has_min"), py::arg("gated"), "The weights of records, [rows, cols].");
}

}  // namespace sr
