// class MemoryBench
#include <mutex>
#include <string>

#include "bindings/bindings.h"
#include "kernels/measure.h"
#include "kernels/pack/pack.h"
#include "model/linear.h"

namespace sr {
namespace {

int in_range(const char* name, py::ssize_t value, py::ssize_t low, py::ssize_t high) {
  if (value < low || value > high) {
    throw Error(ErrorCode::usage, std::string(name) + " must be from " + std::to_string(low) + " to " +
                                      std::to_string(high) + ", got " + std::to_string(value));
  }
  return int(value);
}

double density_in_range(double density) {
  if (!(density > 0 && density <= 1)) {
    throw Error(ErrorCode::usage, "density must be above 0 and at most 1, got " + std::to_string(density));
  }
  return density;
}

// Kind, group and minima of a shape; `wrong` is said of a kind that is not quantised.
template <class Shape>
void set_form(Shape* shape, const std::string& kind, py::ssize_t group, bool has_min, const std::string& wrong) {
  shape->kind = weight_kind_from_name(kind);
  if (!is_quantised(shape->kind)) throw Error(ErrorCode::usage, wrong);
  check_group(group);
  shape->group = int(group);
  shape->has_min = has_min;
}

// One measurement at a time: the pool runs one job, and two would measure each other.
class MemoryBench {
 public:
  MemoryBench(py::ssize_t threads, py::ssize_t megabytes)
      : pool_(in_range("threads", threads, 1, 1024)),
        bank_(size_t(in_range("megabytes", megabytes, 4, 1 << 20)) * 1000000) {}

  double gather(py::ssize_t run, double density) {
    const size_t bytes = size_t(in_range("run", run, 64, py::ssize_t(bank_.part_bytes())));
    std::lock_guard<std::mutex> lock(mutex_);
    return gather_gb_per_s(pool_, bank_, bytes, density_in_range(density));
  }

  ColumnTimes columns(const std::string& kind, py::ssize_t group, bool has_min, py::ssize_t rows, py::ssize_t cols,
                      py::ssize_t panel_rows, double density, bool shared, py::ssize_t superblock) {
    constexpr py::ssize_t kMaxSide = py::ssize_t(1) << 24;
    PanelMatrix shape;
    set_form(&shape, kind, group, has_min, "columns of kind " + kind + " are not skipped");
    shape.rows = in_range("rows", rows, 1, kMaxSide);
    shape.cols = in_range("cols", cols, 1, kMaxSide);
    shape.panel_rows = in_range("panel_rows", panel_rows, kTileRows, kMaxSide);
    if (panel_rows % kTileRows) throw Error(ErrorCode::usage, "panel_rows must be a multiple of 64");
    shape.unit_slabs = unit_slabs_of(superblock);
    if (shared) shape.set_stretches(stretches_that_pay(shape.rows, shape.cols));
    std::lock_guard<std::mutex> lock(mutex_);
    return time_columns(pool_, bank_, shape, density_in_range(density));
  }

  RowTimes rows(const std::string& kind, py::ssize_t group, bool has_min, py::ssize_t neurons, py::ssize_t cols,
                bool gated, double density) {
    constexpr py::ssize_t kMaxSide = py::ssize_t(1) << 24;
    NeuronMatrix shape;
    set_form(&shape, kind, group, has_min, "rows of kind " + kind + " are not measured");
    shape.neurons = in_range("neurons", neurons, 1, kMaxSide);
    shape.cols = in_range("cols", cols, 1, kMaxSide);
    shape.gated = gated;
    std::lock_guard<std::mutex> lock(mutex_);
    return time_rows(pool_, bank_, shape, density_in_range(density));
  }

 private:
  ThreadPool pool_;
  WeightBank bank_;
  std::mutex mutex_;
};

}  // namespace

void bind_measure(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<MemoryBench>(m, "MemoryBench", "Measures what memory and column skipping can do on this machine.")
      .def(py::init<py::ssize_t, py::ssize_t>(), py::arg("threads"), py::arg("megabytes") = 1024, Unlocked())
      .def("gather", &MemoryBench::gather, py::arg("run"), py::arg("density"), Unlocked())
      .def(
          "columns",
          [](MemoryBench& self, const std::string& kind, py::ssize_t group, bool has_min, py::ssize_t rows,
             py::ssize_t cols, py::ssize_t panel_rows, double density, bool shared_columns, py::ssize_t superblock) {
            ColumnTimes t;
            {
              py::gil_scoped_release release;
              t = self.columns(kind, group, has_min, rows, cols, panel_rows, density, shared_columns, superblock);
            }
            py::dict d;
            d["dense_seconds"] = t.dense;
            d["sparse_seconds"] = t.sparse;
            d["dense_bytes"] = t.dense_bytes;
            d["sparse_bytes"] = t.sparse_bytes;
            return d;
          },
          py::arg("kind"), py::arg("group"), py::arg("has_min"), py::arg("rows"), py::arg("cols"),
          py::arg("panel_rows"), py::arg("density"), py::arg("shared_columns") = false,
          py::arg("superblock") = 0)
      .def(
          "rows",
          [](MemoryBench& self, const std::string& kind, py::ssize_t group, bool has_min, py::ssize_t neurons,
             py::ssize_t cols, bool gated, double density) {
            RowTimes t;
            {
              py::gil_scoped_release release;
              t = self.rows(kind, group, has_min, neurons, cols, gated, density);
            }
            py::dict d;
            d["dense_seconds"] = t.dense;
            d["listed_seconds"] = t.listed;
            d["gated_seconds"] = t.gated;
            return d;
          },
          py::arg("kind"), py::arg("group"), py::arg("has_min"), py::arg("neurons"), py::arg("cols"), py::arg("gated"),
          py::arg("density"));
}

}  // namespace sr
