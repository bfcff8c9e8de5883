// A linear layer of few rows on the CPU: bound by how fast the weights stream from memory.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace gptkern {

// out[r, j] = sum_i x[r, i] * weight[j, i] + bias[j], accumulated in fp32 and rounded once.
//
// x (rows, in) and out (rows, outs) are dense; weight lies as (outs, in), or turned as (in, outs), with its
// rows any stride apart; all are of one dtype, fp32 or bf16. A row's result does not depend on the other
// rows, nor on the number of threads.
struct FewRows {
    const void* x;
    const void* weight;
    const void* bias;  // null: none
    void* out;
    int rows, outs, in;
    int64_t weight_stride;
    bool turned;
    DType dtype;
};

bool few_rows_supported();
void few_rows_linear(const FewRows& arguments, int threads);

}  // namespace gptkern
