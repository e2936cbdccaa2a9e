// What Python hands over: a packed model, and the chunks of one step. `binding.py` has the same fields in the same
// order. All pointers stay valid as long as they are used; nothing here owns memory.
#pragma once

#include <cstdint>

extern "C" {

// A matrix [columns, inner] in panels of 32 columns (`pack.cpp`), filled up with zeros.
struct Linear {
  const void* panels;
  const float* scales;         // per column, only for weights of 8 bits
  const int32_t* column_sums;  // likewise
  const float* bias;           // per column, or null
  int32_t inner;               // multiple of 64
  int32_t panel_count;
};

struct Layer {
  const float* attention_norm;
  const float* query_norm;  // null without; so the other optional ones
  const float* key_norm;
  const float* post_attention_norm;
  const float* feed_forward_norm;
  const float* post_feed_forward_norm;
  Linear query_key_value;
  Linear output;
  Linear gate_up;  // panel by panel 16 columns of the gate, then the same 16 of up
  Linear down;
  const float* rotation;  // [context, head_size]: the cosines of all pairs, then their sines
  void* keys;             // [blocks, kv_heads, padded head, page]; a group of kPair elements stays together
  void* values;           // [blocks, kv_heads, page, padded head]; likewise
  int32_t window;         // keys that a query sees; 0 is all
  int32_t unused;
};

struct Model {
  const void* embedding;  // [vocabulary, hidden], not packed
  const float* norm;
  const Layer* layers;
  Linear head;
  int32_t weight_kind;     // 0 float32, 1 bfloat16, 2 int8
  int32_t embedding_kind;  // 0 float32, 1 bfloat16
  int32_t layer_count;
  int32_t vocabulary;
  int32_t hidden;
  int32_t intermediate;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_size;
  int32_t page;        // multiple of 32, divides 256
  int32_t activation;  // 0 silu, 1 gelu_tanh
  float epsilon;
  float attention_scale;
  float attention_softcap;  // 0 is none
  float logit_softcap;      // 0 is none
  float embedding_scale;
};

// Tokens of one sequence.
struct Chunk {
  int32_t start;   // position of the first
  int32_t tokens;  // at least one
  int32_t blocks;  // of its table, which covers all positions
  int32_t draws;   // whether the logits of the last token are wanted
};

struct Step {
  const Chunk* chunks;
  const int32_t* token_ids;     // of all chunks, one behind the other
  const int32_t* tables;        // likewise
  const uint8_t* wants_logits;  // [drawn], one for each chunk that draws: 0 where the best id is enough
  float* logits;                // [drawn, vocabulary]
  int32_t* best;                // [drawn], id of the largest logit, the lowest such; -1 where one is not finite
  uint8_t* finite;              // [tokens]: whether a token could be computed
  int32_t chunk_count;
  int32_t unused;
};
}
