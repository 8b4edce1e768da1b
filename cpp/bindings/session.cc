// class Session. Evaluation runs without the GIL; in the main thread it takes it every now and then, so that Ctrl-C
// works even while a long prompt is computed.
#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "sparse_run/engine.h"
#include "sparse_run/predictor.h"

namespace sr {
namespace {

std::vector<int32_t> token_vector(const py::array& tokens) {
  // A copy: another thread may change the array while it is evaluated.
  const py::array a = checked_array(tokens, 'i', 4, 1, "tokens");
  const auto* data = static_cast<const int32_t*>(a.data());
  return std::vector<int32_t>(data, data + a.size());
}

// Whether the calling thread is the one that runs Python's signal handlers.
bool in_main_thread() {
  const py::object main = py::module_::import("threading").attr("main_thread")();
  return main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

bool signal_pending() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // runs the handlers; the exception of one of them is then set
}

// Runs fn without the GIL. An exception that a signal handler raised meanwhile takes precedence over Cancelled.
template <class Fn>
auto compute(Session& session, Fn fn) {
  const bool main = in_main_thread();
  try {
    py::gil_scoped_release release;
    session.set_poll(main ? std::function<bool()>(signal_pending) : nullptr);
    return fn();
  } catch (const Error&) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw;
  }
}

py::array_t<float> logits_view(const py::object& self) {
  const Session& session = self.cast<const Session&>();
  const float* data = session.logits();
  py::array_t<float> view({py::ssize_t(session.n_vocab())}, {py::ssize_t(sizeof(float))}, data, self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

void set_neurons(Session& session, const py::object& sets, bool mask_prefill) {
  std::vector<std::vector<int32_t>> lists;
  std::vector<int> layers;  // of each list
  std::vector<const std::vector<int32_t>*> all;
  if (!sets.is_none()) {
    for (const auto& entry : sets.cast<py::sequence>()) {
      if (!entry.is_none()) {
        const py::array a = checked_array(py::array::ensure(entry), 'i', 4, 1, "neurons");
        const auto* ids = static_cast<const int32_t*>(a.data());
        lists.emplace_back(ids, ids + a.size());
        layers.push_back(int(all.size()));
      }
      all.push_back(nullptr);
    }
    if (all.empty()) throw Error(ErrorCode::usage, "there are neurons for 0 layers; None ends them");
  }
  for (size_t i = 0; i < lists.size(); i++) all[size_t(layers[i])] = &lists[i];
  session.set_neurons(all, mask_prefill);
}

py::dict stats_dict(const Session& session) {
  const Stats s = session.stats();
  py::dict d;
  d["prompt_tokens"] = s.prompt_tokens;
  d["prompt_seconds"] = s.prompt_seconds;
  d["decode_tokens"] = s.decode_tokens;
  d["decode_seconds"] = s.decode_seconds;
  return d;
}

}  // namespace

void bind_session(py::module_& m) {
  py::class_<Session>(m, "Session", "A KV cache and its buffers. Not for two threads at once, except `cancel`.")
      .def(py::init([](const PyModel& model, int n_ctx) { return std::make_unique<Session>(model.get(), n_ctx); }),
           py::arg("model"), py::arg("n_ctx"))
      .def_property_readonly("n_ctx", &Session::n_ctx)
      .def_property_readonly("n_past", &Session::n_past)
      .def_property_readonly("tokens",
                             [](const Session& self) {
                               const std::vector<int32_t> tokens = self.tokens();
                               py::list out(tokens.size());
                               for (size_t i = 0; i < tokens.size(); i++) out[i] = tokens[i];
                               return out;
                             })
      .def_property_readonly("kv_bytes", &Session::kv_bytes)
      .def("truncate", &Session::truncate, py::arg("n"), "Forgets all but the first `n` cached tokens.")
      .def("eval",  // first, so that a list does not bring NumPy in, a tenth of what a small process takes
           [](Session& self, const py::list& tokens) {
             const auto ids = tokens.cast<std::vector<int32_t>>();
             compute(self, [&] { self.eval(ids.data(), int(ids.size())); });
           },
           py::arg("tokens"))
      .def("eval",
           [](Session& self, const py::array& tokens) {
             const std::vector<int32_t> ids = token_vector(tokens);
             compute(self, [&] { self.eval(ids.data(), int(ids.size())); });
           },
           py::arg("tokens"), "Appends tokens; the last one's logits are then in `logits()`.")
      .def("eval_all",
           [](Session& self, const py::array& tokens) {
             const std::vector<int32_t> ids = token_vector(tokens);
             py::array_t<float> out({py::ssize_t(ids.size()), py::ssize_t(self.n_vocab())});
             float* data = out.mutable_data();
             compute(self, [&] { self.eval_all(ids.data(), int(ids.size()), data); });
             return out;
           },
           py::arg("tokens"), "As eval; returns every token's logits, [len(tokens), n_vocab].")
      .def("logits", &logits_view, "A read-only view [n_vocab] of the last token's logits, valid until the next call.")
      .def("step",
           [](Session& self, Sampler& sampler) { return compute(self, [&] { return self.step(&sampler); }); },
           py::arg("sampler"), "Samples from the last logits, evaluates that token and returns it.")
      .def("sample", [](Session& self, Sampler& sampler) { return self.sample(&sampler); }, py::arg("sampler"),
           py::call_guard<py::gil_scoped_release>(), "Samples from the last logits without evaluating.")
      .def("set_sparsity", &Session::set_sparsity, py::arg("plan").none(true), py::arg("mask_prefill") = false,
           "From now on decoding skips by `plan`; mask_prefill: blocks of tokens are masked as well.")
      .def("density",
           [](Session& self) {
             const Density d = self.density();
             py::dict out;
             for (size_t i = 0; i < std::size(d.site); i++)
               if (d.site[i] >= 0) out[Density::kNames[i]] = d.site[i];
             if (d.body >= 0) out["body"] = d.body;
             if (d.recall >= 0) out["recall"] = d.recall;
             return out;
           },
           "Shares kept by site, and of the layers' bytes read, since the last call.")
      .def("set_neurons", &set_neurons, py::arg("sets").none(true), py::arg("mask_prefill") = false,
           "Decoding computes these neurons only: per layer an ascending int32 array or None (all); None ends it.")
      .def("set_predictor", &Session::set_predictor, py::arg("predictor").none(true), py::arg("mask_prefill") = false,
           py::arg("measure") = false, "From now on decoding computes what the predictor names; None: everything.")
      .def("collect",
           [](Session& self, const std::optional<std::string>& kind) { self.collect(kind ? *kind : ""); },
           py::arg("kind").none(true), "Counts what prompts do to each neuron: \"griffin\", \"core\", or None to end.")
      .def("statistic",
           [](const Session& self) {
             py::array_t<float> out({py::ssize_t(self.n_layers()), py::ssize_t(self.n_ff())});
             self.statistic(out.mutable_data());
             return out;
           },
           "What `collect` has counted, [n_layers, n_ff].")
      .def_property_readonly("collected", [](const Session& self) { return self.statistic(nullptr); },
                             "Tokens that `collect` has counted.")
      .def("set_exact", &Session::set_exact, py::arg("on"),
           "Whether decoding leaves out what the activation makes exactly 0 (the same bits); on by default.")
      .def("embed",
           [](Session& self, const py::array& tokens) {
             const std::vector<int32_t> ids = token_vector(tokens);
             py::array_t<float> out({py::ssize_t(ids.size()), py::ssize_t(self.n_embd())});
             self.embed(ids.data(), int(ids.size()), out.mutable_data());
             return out;
           },
           py::arg("tokens"), "The residual stream before the first layer, [n, n_embd].")
      .def("run_layer",
           [](Session& self, int layer, int pos, const py::array& rows, bool taps) {
             const py::array x = checked_array(rows, 'f', 4, 2, "x");
             if (x.shape(1) != self.n_embd()) throw Error(ErrorCode::usage, "x must have the shape [n, n_embd]");
             const py::ssize_t n = x.shape(0);
             py::array_t<float> out({n, py::ssize_t(self.n_embd())});
             py::dict tapped;
             float* buffers[Session::kTapCount] = {};
             for (int i = 0; taps && i < Session::kTapCount; i++) {
               const int width = self.tap_width(i);
               if (width == 0) continue;
               py::array_t<float> t({n, py::ssize_t(width)});
               buffers[i] = t.mutable_data();
               tapped[Session::kTapNames[i]] = t;
             }
             const float* in = static_cast<const float*>(x.data());
             float* result = out.mutable_data();
             {
               py::gil_scoped_release release;
               self.run_layer(layer, pos, in, int(n), result, buffers);
             }
             return py::make_tuple(out, tapped);
           },
           py::arg("layer"), py::arg("pos"), py::arg("x"), py::arg("taps") = false,
           "One layer alone: the stream after it, and with taps the inputs of its sites before masking.")
      .def("cancel", &Session::cancel, "Makes a running or the next eval raise Cancelled; callable from any thread.")
      .def("stats", &stats_dict, "Tokens and seconds of prompts and of decoding since the session began.");
}

}  // namespace sr
