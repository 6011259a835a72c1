// The recurrent ops without torch's dispatcher, for fastseq/ops/recurrent_direct.py: through it, an
// op of so many arguments takes five times as long as a small layer does. All rows run to the end.
#include <exception>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "tensors.h"

#define FASTSEQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastseq {
namespace ops {

namespace {

// What the caller packs, one number after another; a null pointer is 0.
class Packed {
 public:
  explicit Packed(const int64_t* at) : at_(at) {}
  int64_t number() { return *at_++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(*at_++);
  }
  template <class T>
  TokenRows<T> rows() {
    const int64_t step = number(), row = number();
    return {pointer<T>(), step, row};
  }

 private:
  const int64_t* at_;
};

// The layer: cell, whether double, I, H, P, D, has_biases, projected.
struct Layer {
  int64_t cell;
  bool is_double;
  int64_t I, H, P, D;
  bool has_biases, has_params, projected;

  explicit Layer(Packed layer)
      : cell(layer.number()),
        is_double(layer.number()),
        I(layer.number()),
        H(layer.number()),
        P(layer.number()),
        D(layer.number()),
        has_biases(layer.number()),
        has_params(cell_info(int(cell)).params > 0),
        projected(layer.number()) {}

  // f(direction, which of w_ih, w_hh, b_ih, b_hh, params, w_hr), for those there are, in order.
  template <class F>
  void each_weight(const F& f) const {
    for (int64_t d = 0; d < D; ++d) {
      for (int which = 0; which < 6; ++which) {
        const bool there = which < 2 || (which < 4    ? has_biases
                                         : which == 4 ? has_params
                                                      : projected);
        if (there) f(d, which);
      }
    }
  }
};

struct Steps {
  std::vector<int64_t> rows, first;
};

// T, B, x [step, row, pointer], h0, c0, the weights of each direction.
template <class T>
void read_inputs(const Layer& layer, Packed& call, Steps& steps, RecurrentInputs<T>& a) {
  const int64_t T_ = call.number(), B = call.number();
  steps.rows.assign(size_t(T_), B);
  steps.first.resize(size_t(T_));
  for (int64_t t = 0; t < T_; ++t) steps.first[size_t(t)] = t * B;
  a.shape = {
      T_,     B, layer.I, layer.H, layer.P, layer.D, T_ * B, steps.rows.data(), steps.first.data(),
      nullptr};
  a.x = call.rows<const T>();
  a.h0 = call.pointer<const T>();
  a.c0 = call.pointer<const T>();
  layer.each_weight([&](int64_t d, int which) {
    RecurrentWeights<T>& w = a.weights[d];
    const T** to[] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.params, &w.w_hr};
    *to[which] = call.pointer<const T>();
  });
}

// Then y, h_n, c_n, saved.
template <class T>
void forward(const Layer& layer, Packed call) {
  RecurrentForward<T> a{};
  Steps steps;
  read_inputs(layer, call, steps, a);
  const int64_t width = layer.D * layer.P;
  a.y = {call.pointer<T>(), a.shape.B * width, width};
  a.h_n = call.pointer<T>();
  a.c_n = call.pointer<T>();
  a.saved = call.pointer<T>();
  kernels().recurrent.of<T>()[layer.cell].forward(a, torch_threads());
}

// Then saved, dy [step, row, pointer], dh_n, dc_n, dx, dh0, dc0, the gradient of each weight.
template <class T>
void backward(const Layer& layer, Packed call) {
  RecurrentBackward<T> a{};
  Steps steps;
  read_inputs(layer, call, steps, a);
  a.saved = call.pointer<const T>();
  a.dy = call.rows<const T>();
  a.dh_n = call.pointer<const T>();
  a.dc_n = call.pointer<const T>();
  a.dx = {call.pointer<T>(), a.shape.B * layer.I, layer.I};
  a.dh0 = call.pointer<T>();
  a.dc0 = call.pointer<T>();
  layer.each_weight([&](int64_t d, int which) {
    T** to[] = {a.dw_ih, a.dw_hh, a.db_ih, a.db_hh, a.dparams, a.dw_hr};
    to[which][d] = call.pointer<T>();
  });
  kernels().recurrent.of<T>()[layer.cell].backward(a, torch_threads());
}

// Null, or what went wrong, until the thread's next call: no exception may leave a C function.
template <class F>
const char* guarded(const F& f) {
  static thread_local std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

FASTSEQ_EXPORT const char* fastseq_recurrent_fwd(const int64_t* packed_layer, const int64_t* call) {
  return guarded([&] {
    const Layer layer{Packed(packed_layer)};
    layer.is_double ? forward<double>(layer, Packed(call)) : forward<float>(layer, Packed(call));
  });
}

FASTSEQ_EXPORT const char* fastseq_recurrent_bwd(const int64_t* packed_layer, const int64_t* call) {
  return guarded([&] {
    const Layer layer{Packed(packed_layer)};
    layer.is_double ? backward<double>(layer, Packed(call)) : backward<float>(layer, Packed(call));
  });
}

}  // namespace ops
}  // namespace fastseq
