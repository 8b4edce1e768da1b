// class Sampler
#include "bindings/bindings.h"
#include "sparse_run/engine.h"

namespace sr {

void bind_sampler(py::module_& m) {
  const SamplerOptions d;
  py::class_<Sampler>(m, "Sampler", "Seeded token sampler in llama.cpp's order and meaning.")
      .def(py::init([](float temperature, int top_k, float top_p, float min_p, float repeat_penalty, int repeat_last_n,
                       int64_t seed) {
             SamplerOptions o;
             o.temperature = temperature;
             o.top_k = top_k;
             o.top_p = top_p;
             o.min_p = min_p;
             o.repeat_penalty = repeat_penalty;
             o.repeat_last_n = repeat_last_n;
             o.seed = seed;
             return Sampler(o);
           }),
           py::arg("temperature") = d.temperature, py::arg("top_k") = d.top_k, py::arg("top_p") = d.top_p,
           py::arg("min_p") = d.min_p, py::arg("repeat_penalty") = d.repeat_penalty,
           py::arg("repeat_last_n") = d.repeat_last_n, py::arg("seed") = d.seed)
      .def_property_readonly("seed", &Sampler::seed, "The seed in use; repeats the run when it was drawn (-1).")
      .def("sample",
           [](Sampler& self, const py::array& logits_in) {
             const py::array logits = checked_array(logits_in, 'f', 4, 1, "logits");
             const auto* data = static_cast<const float*>(logits.data());
             const int n = int(logits.size());
             py::gil_scoped_release release;
             return self.sample(data, n);
           },
           py::arg("logits"), "Picks a token from logits [n_vocab] without accepting it.")
      .def("accept", &Sampler::accept, py::arg("token"), "Counts the token for the repetition penalty.")
      .def("reset", &Sampler::reset, "Forgets accepted tokens and starts the seed's sequence again.");
}

}  // namespace sr
