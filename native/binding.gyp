{
  "variables": {
    # BLOCKFERRY_SANITIZE=1 builds with ASan and UBSan, for test/fuzz/sanitizers.ts.
    "sanitize%": "<!(echo ${BLOCKFERRY_SANITIZE:-0})",
  },
  "targets": [
    {
      "target_name": "blockferry",
      "sources": ["src/batch.cc", "src/binding.cc", "src/bitmap.cc", "src/exchange.cc", "src/reader.cc", "src/ring.cc", "src/system.cc"],
      "cflags_cc": ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-fvisibility=hidden"],
      "cflags_cc!": ["-std=gnu++17", "-std=gnu++20"],
      "defines": ["NAPI_VERSION=8", "_FILE_OFFSET_BITS=64"],
      "conditions": [
        [
          "sanitize==1",
          {
            "cflags_cc": ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
            "ldflags": ["-fsanitize=address,undefined"],
          },
        ],
      ],
    },
    {
      # The load generator of `blockferry bench`: a program of its own, so that it shares no thread with what it measures.
      "target_name": "blockferry-load",
      "type": "executable",
      "sources": [
        "load/connection.cc",
        "load/handshake.cc",
        "load/load.cc",
        "load/main.cc",
        "load/options.cc",
        "load/verifier.cc",
      ],
      "cflags_cc": ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
      "cflags_cc!": ["-std=gnu++17", "-std=gnu++20"],
      "defines": ["_FILE_OFFSET_BITS=64"],
      "conditions": [
        [
          "sanitize==1",
          {
            "cflags_cc": ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
            "ldflags": ["-fsanitize=address,undefined"],
          },
        ],
      ],
    },
  ]
}
