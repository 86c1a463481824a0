package mobilemoe.chat

import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.lazy.rememberLazyListState
import androidx.compose.material3.Button
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Surface
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.dp
import androidx.lifecycle.viewmodel.compose.viewModel

class MainActivity : ComponentActivity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContent { MaterialTheme { Surface(Modifier.fillMaxSize()) { Screen() } } }
    }
}

@Composable
fun Screen(conversation: Conversation = viewModel()) {
    var draft by rememberSaveable { mutableStateOf("") }
    val list = rememberLazyListState()
    val messages = conversation.messages
    LaunchedEffect(messages.size, messages.lastOrNull()) {
        if (messages.isNotEmpty()) list.scrollToItem(messages.lastIndex)
    }
    Column(Modifier.fillMaxSize().safeDrawingPadding().padding(8.dp)) {
        LazyColumn(Modifier.weight(1f), list) {
            items(messages) { message ->
                val colors = MaterialTheme.colorScheme
                Surface(
                    Modifier.fillMaxWidth().padding(4.dp),
                    shape = MaterialTheme.shapes.medium,
                    color = if (message.isUser) colors.primaryContainer else colors.surfaceVariant,
                ) {
                    Text(message.text, Modifier.padding(8.dp))
                }
            }
        }
        Row(verticalAlignment = Alignment.CenterVertically) {
            OutlinedTextField(draft, { draft = it }, Modifier.weight(1f).padding(end = 8.dp))
            if (conversation.isBusy) {
                Button(onClick = conversation::stop) { Text("Stop") }
            } else {
                Button(
                    onClick = {
                        conversation.send(draft.trim())
                        draft = ""
                    },
                    enabled = draft.isNotBlank(),
                ) {
                    Text("Send")
                }
            }
        }
    }
}
