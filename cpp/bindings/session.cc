// class Session. Evaluation runs without the GIL; in the main thread it takes it every now and then, so that Ctrl-C
// works even while a long prompt is computed.
#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "sparse_run/engine.h"

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
      .def("cancel", &Session::cancel, "Makes a running or the next eval raise Cancelled; callable from any thread.")
      .def("stats", &stats_dict, "Tokens and seconds of prompts and of decoding since the session began.");
}

}  // namespace sr
