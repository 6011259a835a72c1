// An LSTM whose sums and cell state are normalised over all units of a row: n(v) = (v - mean v) /
// sqrt(var v + epsilon). Params: gain_x (4), gain_h (4), gain_c, bias_c.
//
//   z = n(x sums) * gain_x + n(h sums) * gain_h + bias     i, f, g, o and c as in an LSTM
//   h = o * tanh(n(c) * gain_c + bias_c)
//
// A row's statistics need all its units, so the step comes in stages; the loop that runs them
// (csrc/cpu/recurrent/normalised.inl) takes the means.
//
// Source: Ba, Kiros and Hinton 2016, equations 20 to 22.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

struct LayerNormLstm {
  static constexpr int kGates = 4, kApart = -1, kStates = 2;
  // x sums, h sums, gates, c; backward() makes h again.
  static constexpr int kSaved = 13, kSavedC = 12, kSavedH = -1;
  static constexpr int kSavedX = 0, kSavedHidden = 4, kSavedGates = 8;
  static constexpr bool kReadsH = false, kCarriesH = false;
  static constexpr int kParams = 10, kMasks = 0;
  static constexpr int kGainX = 0, kGainH = 4, kGainC = 8, kBiasC = 9;
  static constexpr double kEpsilon = 1e-5;

  // From normalised sums nx and nh to the gates and c.
  template <class V>
  FASTSEQ_CELL void gates(const V* nx, const V* nh, const V* bias, const V* params, V* gate, V& c) {
    V z[4];
    for (int i = 0; i < 4; ++i) {
      z[i] = fma(nx[i], params[kGainX + i], fma(nh[i], params[kGainH + i], bias[i]));
    }
    gate[0] = sigmoid(z[0]);
    gate[1] = sigmoid(z[1]);
    gate[2] = tanh(z[2]);
    gate[3] = sigmoid(z[3]);
    c = fma(gate[1], c, gate[0] * gate[2]);
  }

  // h, from the normalised c.
  template <class V>
  FASTSEQ_CELL V output(V nc, V o, V gain, V bias) {
    return o * tanh(fma(nc, gain, bias));
  }

  // From dL/dh to dL/d(nc), the output gate's dz, the gradients of gain and bias, and h once more.
  template <class V>
  FASTSEQ_CELL V output_backward(V nc, V o, V gain, V bias, V dh, V& dz_o, V& dgain, V& dbias,
                                 V& h) {
    const V one = V{} + 1, squashed = tanh(fma(nc, gain, bias));
    h = o * squashed;
    dz_o = dh * squashed * o * (one - o);
    dbias = dh * o * (one - squashed * squashed);
    dgain = dbias * nc;
    return dbias * gain;
  }

  // From dL/dc of every path to the other gates' dz, and to dc of the step before.
  template <class V>
  FASTSEQ_CELL void gates_backward(const V* gate, V c_prev, V& dc, V* dz) {
    const V one = V{} + 1, i = gate[0], f = gate[1], g = gate[2];
    // Factors below one first, as in an LSTM.
    dz[0] = dc * (i * (one - i)) * g;
    dz[1] = dc * (f * (one - f)) * c_prev;
    dz[2] = dc * i * (one - g * g);
    dc = dc * f;
  }
};

template <>
constexpr bool kNormalised<LayerNormLstm> = true;

}  // namespace cell
}  // namespace fastseq
