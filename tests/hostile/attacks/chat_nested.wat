;; Gives the chat template JSON nested 100,000 deep, and messages nested 1,000 deep. Refused; returns how many were not.
(module
  (import "realm" "chat_template" (func $chat_template (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 110000) "[{\22role\22:\22user\22,\22content\22:")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32)
    (memory.fill (i32.const 0) (i32.const 91) (i32.const 100000))
    (if (i32.ne (call $chat_template (i32.const 0) (i32.const 100000) (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const -1)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (memory.copy (i32.const 0) (i32.const 110000) (i32.const 27)) (memory.fill (i32.const 27) (i32.const 91) (i32.const 1000)) (memory.fill (i32.const 1027) (i32.const 93) (i32.const 1000)) (i32.store16 (i32.const 2027) (i32.const 0x5d7d))
    (if (i32.ne (call $chat_template (i32.const 0) (i32.const 2029) (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const -1)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (local.get $n)))
