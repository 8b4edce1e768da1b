// class Sparsity
#include <memory>
#include <string>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "sparse_run/engine.h"

namespace sr {

void bind_sparsity(py::module_& m) {
  py::class_<Sparsity>(m, "Sparsity", "Thresholds at the sites A, O, M, Z and G of every layer, bound to one model.")
      .def(py::init([](const PyModel& model, const py::dict& thresholds, int dense_tokens,
                       const py::object& break_even) {
             auto plan = std::make_unique<Sparsity>(model.get(), dense_tokens);
             if (py::isinstance<py::dict>(break_even)) {
               for (const auto& item : break_even.cast<py::dict>())
                 plan->set_break_even(py::str(item.first), item.second.cast<float>());
             } else if (!break_even.is_none()) {
               for (const char* site : {"A", "O", "M", "Z", "G"}) plan->set_break_even(site, break_even.cast<float>());
             }
             for (const auto& item : thresholds) {
               const std::string site = py::str(item.first);
               int layer = 0;
               for (const auto& entry : item.second.cast<py::sequence>()) {
                 if (!entry.is_none()) {
                   const py::array a = checked_array(py::array::ensure(entry), 'f', 4, 1, "thresholds");
                   plan->set(site, layer, static_cast<const float*>(a.data()), size_t(a.size()));
                 }
                 layer++;
               }
             }
             return plan;
           }),
           py::arg("model"), py::arg("thresholds"), py::arg("dense_tokens") = 16, py::arg("break_even") = py::none())
      .def("break_even", &Sparsity::break_even, py::arg("site"),
           "The density above which products of a site run dense, as it was given or as the layers' shapes give it.")
      .def_property_readonly("dense_tokens", &Sparsity::dense_tokens);
}

}  // namespace sr
