// The table of cells: X(name, struct). Their place in it is the number that ops take; the name is
// the one that Python knows. Normalised cells (cell.h), which have no step of one unit alone, come
// last.
#pragma once

#include "gru.h"
#include "layer_norm_lstm.h"
#include "lstm.h"
#include "peephole_lstm.h"
#include "rnn.h"
#include "zoneout.h"

#define FASTSEQ_CELLS(X)                       \
  X("lstm", cell::Lstm)                        \
  X("gru", cell::Gru)                          \
  X("rnn_tanh", cell::RnnTanh)                 \
  X("rnn_relu", cell::RnnRelu)                 \
  X("peephole_lstm", cell::PeepholeLstm)       \
  X("zoneout_lstm", cell::Zoneout<cell::Lstm>) \
  X("zoneout_gru", cell::Zoneout<cell::Gru>)

#define FASTSEQ_ALL_CELLS(X) \
  FASTSEQ_CELLS(X)           \
  X("layer_norm_lstm", cell::LayerNormLstm)
