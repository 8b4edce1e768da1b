// class Model
#include "bindings/model.h"

#include <memory>
#include <optional>

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace sr {

void bind_model(py::module_& m) {
  py::class_<PyModel>(m, "Model", "A mapped packed model, shared by sessions; owns the thread pool.")
      .def(py::init([](const std::string& path, int threads, std::optional<bool> mmap) {
             py::gil_scoped_release release;
             ModelOptions options;
             options.path = path;
             options.threads = threads;
             if (mmap) options.memory = *mmap ? WeightMemory::mapped : WeightMemory::copied;
             return std::make_unique<PyModel>(options);
           }),
           py::arg("path"), py::arg("threads") = 0, py::arg("mmap") = py::none())
      .def_property_readonly("mapped", [](const PyModel& self) { return !self.get().copied(); },
                             "Whether the weights are mapped from the file, not copied into memory.")
      .def_property_readonly("config_json", [](const PyModel& self) { return self.get().config_json(); })
      .def_property_readonly("threads", [](const PyModel& self) { return self.get().threads(); })
      .def_property_readonly("isa", [](const PyModel& self) { return self.get().isa(); })
      .def_property_readonly("weight_bytes", [](const PyModel& self) { return self.get().weight_bytes(); },
                             "Bytes of all tensors.")
      .def_property_readonly("bytes_per_token", [](const PyModel& self) { return self.get().bytes_per_token(); },
                             "Weight bytes that one decoded token reads (dense).")
      .def("close", &PyModel::close, "Lets go of the model; sessions that live keep it mapped.");
}

}  // namespace sr
