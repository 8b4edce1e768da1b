// Facts about the processor and the build, the stream test, and the log sink.
#include <pybind11/stl.h>

#include "base/cpu_info.h"
#include "base/log.h"
#include "bindings/bindings.h"
#include "kernels/table.h"
#include "sparse_run/engine.h"

namespace sr {
namespace {

py::list isa_list() {
  int n = 0;
  const IsaEntry* entries = isa_entries(&n);
  const KernelTable* selected = &kernels();
  py::list out;
  for (int i = 0; i < n; i++) {
    py::dict d;
    d["name"] = entries[i].table->name;
    d["supported"] = entries[i].supported;
    d["selected"] = entries[i].table == selected;
    out.append(d);
  }
  return out;
}

py::dict cpu_info_dict() {
  const CpuInfo& info = cpu_info();
  py::dict d;
  d["brand"] = py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(info.brand.data(), py::ssize_t(info.brand.size()), "replace"));
  d["features"] = py::cast(info.features);
  d["physical_cores"] = info.physical_cores;
  d["allowed_cores"] = info.allowed_cores;
  d["default_threads"] = default_threads();
  return d;
}

// None for what is not known.
py::dict gpu_info_dict() {
  const GpuInfo g = gpu_info();
  const auto text = [](const std::string& s) -> py::object { return s.empty() ? py::object(py::none()) : py::str(s); };
  py::dict d;
  d["built"] = g.built;
  d["toolkit"] = text(g.toolkit);
  d["architectures"] = text(g.architectures);
  d["driver_cuda"] = text(g.driver_cuda);
  d["devices"] = g.devices;
  d["name"] = text(g.name);
  d["capability"] = text(g.capability);
  d["code"] = text(g.code);
  d["multiprocessors"] = g.multiprocessors;
  d["memory_bytes"] = g.memory_bytes;
  d["free_bytes"] = g.free_bytes;
  return d;
}

void set_python_log_sink(const py::object& sink, int level) {
  if (!sink.is_none() && !PyCallable_Check(sink.ptr())) {
    throw Error(ErrorCode::usage, "sink must be callable or None");
  }
  // Kept for the life of the process: the interpreter may be gone when static objects are destroyed.
  PyObject* callable = sink.is_none() ? nullptr : sink.inc_ref().ptr();
  py::gil_scoped_release free;  // a message that is on its way waits for the interpreter, with the log's lock held
  if (!callable) return set_log_sink(nullptr);
  set_log_sink(
      [callable](LogLevel at, const std::string& text) {
        py::gil_scoped_acquire gil;
        try {
          py::reinterpret_borrow<py::object>(callable)(int(at), text);
        } catch (py::error_already_set& e) {
          e.discard_as_unraisable("sparse_run log sink");
        }
      },
      LogLevel(level));
}

}  // namespace

void bind_system(py::module_& m) {
  m.def("isa_list", &isa_list, "Instruction sets of this build, best first.");
  m.def("cpu_info", &cpu_info_dict, "Brand, features and core counts of this processor.");
  m.def("gpu_problem", &gpu_problem, "Why no GPU can be used, in one line; \"\" where one can.");
  m.def("gpu_info", &gpu_info_dict, "The first GPU, the driver, and what this build has for them.");
  m.def("default_threads", &default_threads, "Physical cores allowed by the affinity mask and the cgroup quota.");
  m.def("stream_gb_per_s", &stream_gb_per_s, py::arg("threads"), py::arg("megabytes") = 512, py::arg("repetitions") = 5,
        py::call_guard<py::gil_scoped_release>(), "Read rate of this machine's memory, GB/s, one value a repetition.");
  m.def("set_log_sink", &set_python_log_sink, py::arg("sink").none(true), py::arg("level") = int(LogLevel::info),
        "Calls sink(level, text) for messages of the core from `level` on (logging's numbers); None = silent.");
}

}  // namespace sr
