// What the attention kernels compute, as plain data: one call of `ai.reattend::Attention` or
// `ai.reattend::LatentAttention`. Letters as everywhere: B batch, N queries, C capacity, H query
// heads, G key/value groups.
//
// The kernels are compiled once for every instruction set (`build.py`), each time under another
// namespace, and `ops.cc` picks one when the library is loaded.
#pragma once
#include <cstdint>

namespace reattend {

struct Call {
  bool half;  // float16 numbers, else float32
  int64_t batch, heads, groups, queries, capacity;
  int parts;               // 1; 2 for latent rows with a rotary part
  const void* query[2];    // [B, H, N, width]
  const void* key[2];      // [B, G, C, width]
  int64_t width[2];
  const void* value;       // [B, G, C, value_width]; key[0] itself for latent rows
  int64_t value_width;
  const int64_t* start;    // [B] first row that counts
  const int64_t* length;   // [B] one past the last
  float scale, softcap;
  bool causal;
  int64_t window;          // 0: none
  void* y;                 // [B, H, N, value_width]
};

// How a call is cut: tiles of query rows that share keys, and, where there are few of them, spans
// of the cache whose results are merged. Equal for every number of threads.
struct Cut {
  int64_t tiles, splits;
  int64_t partial;  // floats that each task leaves behind if splits > 1
};

struct Kernels {
  const char* name;
  Cut (*cut)(const Call&);
  // Task i of batch * groups * tiles * splits; `partial` holds all tasks' results. False: no memory.
  bool (*run)(const Call&, const Cut&, int64_t task, float* partial);
  // Merges the spans of tile i of batch * groups * tiles; only needed if splits > 1.
  bool (*merge)(const Call&, const Cut&, int64_t tile, const float* partial);
};

}  // namespace reattend
