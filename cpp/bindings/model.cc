// class Model
#include "bindings/model.h"

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace sr {
namespace {

// Calls progress with the GIL, at most every 50 ms; its exception, or that of a signal handler, stops the loading and
// is raised.
std::unique_ptr<PyModel> open_model(const std::string& path, int threads, std::optional<bool> mmap, size_t budget,
                                    int n_ctx, size_t extra_bytes, const py::object& progress,
                                    const std::string& device, double neuron_share, size_t aside_bytes,
                                    size_t device_memory, bool by_gate) {
  ModelOptions options;
  options.path = path;
  options.threads = threads;
  options.device = device;
  if (mmap) options.memory = *mmap ? WeightMemory::mapped : WeightMemory::copied;
  options.memory_budget = budget;
  options.device_memory = device_memory;
  options.n_ctx = n_ctx;
  options.extra_bytes = extra_bytes;
  options.neuron_share = neuron_share;
  options.aside_bytes = aside_bytes;
  options.by_gate = by_gate;
  if (budget && mmap) throw Error(ErrorCode::usage, "mmap cannot be chosen together with a memory budget");
  if (n_ctx < 0) throw Error(ErrorCode::usage, "n_ctx must be 0 or more, got " + std::to_string(n_ctx));
  using Clock = std::chrono::steady_clock;
  Clock::time_point last{};
  std::optional<py::error_already_set> raised;
  options.progress = [&](size_t done, size_t total) {
    const Clock::time_point now = Clock::now();
    if (done < total && now - last < std::chrono::milliseconds(50)) return false;
    last = now;
    py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(done, total);
    } catch (py::error_already_set& e) {
      raised = e;
    }
    return raised.has_value();
  };
  std::unique_ptr<PyModel> model;
  try {
    py::gil_scoped_release release;
    model = std::make_unique<PyModel>(options);
  } catch (const Error& e) {
    if (!raised) throw;
  }
  if (raised) throw *raised;
  return model;
}

py::dict memory_dict(const PyModel& self) {
  const MemoryStats m = self.get().memory();
  py::dict d;
  d["budget_bytes"] = m.budget;
  d["process_bytes"] = m.process;
  d["working_bytes"] = m.working;
  d["context_bytes"] = m.contexts;
  d["resident_bytes"] = m.resident;
  d["ring_bytes"] = m.ring;
  d["neuron_bytes"] = m.neurons;
  d["neuron_slots"] = m.neuron_slots;
  d["gate_bytes"] = m.gates;
  d["gate_streamed_bytes"] = m.gates_streamed;
  d["no_neurons"] = m.no_neurons;
  d["streamed_bytes"] = m.streamed;
  d["n_ctx"] = m.n_ctx;
  d["disk_bytes_per_s"] = m.disk_rate;
  d["direct"] = m.direct;
  d["passes"] = m.passes;
  d["read_bytes"] = m.read_bytes;
  d["reads"] = m.reads;
  d["hits"] = m.hits;
  d["misses"] = m.misses;
  d["neuron_tokens"] = m.neuron_tokens;
  d["neuron_hits"] = m.neuron_hits;
  d["neuron_misses"] = m.neuron_misses;
  d["read_seconds"] = m.read_seconds;
  d["wait_seconds"] = m.wait_seconds;
  d["queue_depth"] = m.queue_depth;
  return d;
}

py::dict device_memory_dict(const PyModel& self) {
  const DeviceMemory m = self.get().device_memory();
  py::dict d;
  d["budget_bytes"] = m.budget;
  d["floor_bytes"] = m.floor;
  d["weight_bytes"] = m.weights;
  d["cpu_weight_bytes"] = m.cpu_weights;
  d["cpu_layers"] = m.cpu_layers;
  d["hot_share"] = m.hot_share;
  return d;
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<PyModel>(m, "Model", "A mapped packed model, shared by sessions; owns the thread pool.")
      .def(py::init(&open_model), py::arg("path"), py::arg("threads") = 0, py::arg("mmap") = py::none(),
           py::arg("memory_budget") = 0, py::arg("n_ctx") = 0, py::arg("extra_bytes") = 0,
           py::arg("progress") = py::none(), py::arg("device") = "cpu", py::arg("neuron_share") = 0.0,
           py::arg("aside_bytes") = 0, py::arg("device_memory") = 0, py::arg("by_gate") = false)
      .def("memory", &memory_dict)
      .def("device_memory", &device_memory_dict)
      .def(
          "set_break_even",
          [](PyModel& self, const std::string& site, float value) { self.get().set_break_even(site, value); },
          py::arg("site"), py::arg("break_even"))
      .def("set_aside",
           [](PyModel& self, size_t bytes, bool for_good) {
             Model model = self.get();
             py::gil_scoped_release release;
             model.set_aside(bytes, for_good);
           },
           py::arg("bytes"), py::arg("for_good") = false,
           "Under a memory budget, makes weights give way to what the caller is about to take; 0 ends that.")
      .def_property_readonly("mapped", [](const PyModel& self) { return !self.get().copied(); },
                             "Whether the weights are mapped from the file, not copied into memory.")
      .def_property_readonly("config_json", [](const PyModel& self) { return self.get().config_json(); })
      .def_property_readonly("threads", [](const PyModel& self) { return self.get().threads(); })
      .def_property_readonly("device", [](const PyModel& self) { return self.get().device(); },
                             "\"cpu\", or the name of the GPU that runs the model.")
      .def_property_readonly("isa", [](const PyModel& self) { return self.get().isa(); })
      .def_property_readonly("weight_bytes", [](const PyModel& self) { return self.get().weight_bytes(); },
                             "Bytes of all tensors.")
      .def_property_readonly("bytes_per_token", [](const PyModel& self) { return self.get().bytes_per_token(); },
                             "Weight bytes that one decoded token reads (dense).")
      .def("close", &PyModel::close, "Lets go of the model; sessions that live keep it mapped.");
}

}  // namespace sr
