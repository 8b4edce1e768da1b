// class Predictor
#include <memory>
#include <optional>
#include <string>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "sparse_run/predictor.h"

namespace sr {
namespace {

// One predictor's arrays, kept while its weights are copied.
struct Arrays {
  py::array a, a_scale, b, b_scale, threshold;
  LowRankWeights weights() const {
    LowRankWeights w;
    w.rank = int(a.shape(0));
    w.n = int(b.shape(0));
    w.a = static_cast<const int8_t*>(a.data());
    w.a_scale = static_cast<const float*>(a_scale.data());
    w.b = static_cast<const int8_t*>(b.data());
    w.b_scale = static_cast<const float*>(b_scale.data());
    w.threshold = static_cast<const float*>(threshold.data());
    return w;
  }
};

std::optional<Arrays> arrays_of(const py::object& arrays, const std::string& prefix, int n_embd) {
  if (!arrays.contains(prefix + ".a")) return std::nullopt;
  const auto get = [&](const char* key, char kind, int itemsize, int ndim) {
    const std::string name = prefix + "." + key;
    if (!arrays.contains(name)) throw Error(ErrorCode::usage, "the array " + name + " is missing");
    return checked_array(py::array::ensure(arrays[name.c_str()]), kind, itemsize, ndim, name.c_str());
  };
  Arrays out = {get("a", 'i', 1, 2), get("a_scale", 'f', 4, 1), get("b", 'i', 1, 2), get("b_scale", 'f', 4, 1),
                get("threshold", 'f', 4, 1)};
  const py::ssize_t rank = out.a.shape(0), n = out.b.shape(0);
  if (out.a.shape(1) != n_embd || out.a_scale.shape(0) != rank || out.b.shape(1) != rank ||
      out.b_scale.shape(0) != n || out.threshold.shape(0) != n) {
    throw Error(ErrorCode::usage, "the arrays " + prefix + " do not fit together, or not this model (a [rank, " +
                                      std::to_string(n_embd) + "], b [n, rank]); train them again with sparse-run "
                                      "train-predictor");
  }
  return out;
}

}  // namespace

void bind_predictor(py::module_& m) {
  py::class_<Predictor>(m, "Predictor", "Low-rank predictors of neurons and heads, bound to one model.")
      .def(py::init([](const PyModel& py_model, const py::object& arrays, int dense_tokens) {
             const Model model = py_model.get();
             auto predictor = std::make_unique<Predictor>(model, dense_tokens);
             int found = 0;
             for (int layer = 0; layer < model.n_layers(); layer++) {
               const std::string at = "predictor." + std::to_string(layer);
               if (const auto w = arrays_of(arrays, at + ".neurons", model.n_embd())) {
                 predictor->set_neurons(layer, w->weights());
                 found++;
               }
               if (const auto w = arrays_of(arrays, at + ".heads", model.n_embd())) {
                 predictor->set_heads(layer, w->weights());
                 found++;
               }
             }
             if (!found) throw Error(ErrorCode::usage, "there is no predictor among these arrays");
             return predictor;
           }),
           py::arg("model"), py::arg("arrays"), py::arg("dense_tokens") = 16)
      .def_property_readonly("dense_tokens", &Predictor::dense_tokens)
      .def_property_readonly("nbytes", &Predictor::bytes, "Bytes that a decoded token reads of the predictors.");
  m.def("predictor_bytes", &predictor_bytes, py::arg("rank"), py::arg("n"), py::arg("n_embd"),
        "Memory that a Predictor takes for one layer's neurons or heads.");
}

}  // namespace sr
