;; Loads a vector across its memory's end. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32x4.extract_lane 0 (v128.load (i32.const 65530)))))
