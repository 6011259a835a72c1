// Which instruction set runs, decided once at load and changeable by name.
#pragma once

#include "kernels.h"

namespace fastseq {

// The table in use: the widest this machine has, or a narrower one named by FASTSEQ_CPU_ISA.
const Kernels& kernels();

// All tables built in, narrowest first; the machine may lack the later ones.
int built_count();
const Kernels& built(int i);
bool machine_has(int i);

// True where `name` was built and this machine has it; then it is used from now on.
bool use_isa(const char* name);

// One sentence: why the table in use is the one in use.
const char* isa_reason();

}  // namespace fastseq
