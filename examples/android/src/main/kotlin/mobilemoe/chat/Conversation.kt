package mobilemoe.chat

import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateListOf
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import androidx.lifecycle.ViewModel
import java.util.concurrent.Executors
import org.pytorch.executorch.ExecutorchRuntimeException
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmGenerationConfig
import org.pytorch.executorch.extension.llm.LlmModule

// Where README.md puts the program. The app may read there, and needs no permission for it.
private const val DIRECTORY = "/data/local/tmp/mobilemoe-chat"

private const val TEMPERATURE = 0.7f

// The released chat format. The runner reads these as tokens and adds none.
private const val BEGIN = "<|begin_of_text|>"
private const val END_OF_TURN = "<|eot|>"
private const val END_OF_TEXT = "<|end_of_text|>"
private const val USER = "<|header_start|>user<|header_end|>\n\n"
private const val ASSISTANT = "<|header_start|>assistant<|header_end|>\n\n"

data class Message(val isUser: Boolean, val text: String)

/** Messages as the screen shows them. The runner keeps the cache, so that a turn sends it only what is new. */
class Conversation : ViewModel() {
    val messages = mutableStateListOf<Message>()
    var isBusy by mutableStateOf(false)
        private set

    // The runner takes one call at a time, which lasts for the whole answer.
    private val worker = Executors.newSingleThreadExecutor()
    private var module: LlmModule? = null
    private var hasBegun = false

    fun send(text: String) {
        isBusy = true
        messages += Message(true, text)
        messages += Message(false, "")
        worker.execute {
            try {
                answer(text)
            } catch (error: ExecutorchRuntimeException) {
                // Mostly a full context.
                module?.resetContext()
                hasBegun = false
                show("\n[${error.message} The conversation was forgotten: send the message again.]")
            } catch (error: IllegalArgumentException) {
                // A file is missing or cannot be read.
                show("[${error.message}. README.md says how to copy it there.]")
            } finally {
                isBusy = false
            }
        }
    }

    fun stop() {
        module?.stop()
    }

    private fun answer(text: String) {
        val model = module ?: load().also { module = it }
        // The token that ended the last answer has not run.
        val prompt = (if (hasBegun) END_OF_TURN else BEGIN) + USER + text + END_OF_TURN + ASSISTANT
        hasBegun = true
        // Up to the end of the context.
        val config = LlmGenerationConfig.create().echo(false).temperature(TEMPERATURE).build()
        val callback =
            object : LlmCallback {
                override fun onResult(result: String) {
                    if (result != END_OF_TURN && result != END_OF_TEXT) show(result)
                }
            }
        model.generate(prompt, config, callback)
    }

    private fun load() =
        LlmModule("$DIRECTORY/model.pte", "$DIRECTORY/tokenizer.json", TEMPERATURE).also { it.load() }

    private fun show(text: String) {
        val last = messages.lastIndex
        messages[last] = messages[last].copy(text = messages[last].text + text)
    }

    override fun onCleared() {
        stop()
        worker.execute { module?.close() }
        worker.shutdown()
    }
}
